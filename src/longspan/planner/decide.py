"""Which mechanism, and which placement: computed from the registry's costs, the device, and what evals found.

Every mechanism of the registry is planned, on several GPUs by every placement that serves it. What does not fit, is not
exact though that was asked for, or misses a limit is out, with the reason. Of the rest, what is exact comes first; of
approximations those that found most in committed evals, and of equals the fastest at worst. It prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longspan.errors import UsageError
from longspan.lengths import short
from longspan.planner import evidence, formats, parallel, plan, words
from longspan.planner.devices import NETWORK
from longspan.planner.evidence import Found
from longspan.planner.memory import mechanism
from longspan.planner.parallel import Ranks
from longspan.planner.plan import Asked, Plan

WAIT, ANSWER = 60.0, 500
"""Seconds until the first token that a person waits, and tokens of an answer."""
_NARROW = ("fp8", "int4")
"""KV formats that are tried where keys and values do not fit in the model's own type."""
_EQUAL = 1.1
"""Times that differ by no larger factor count as equal: then what sends less to other nodes is better."""


@dataclass(frozen=True)
class Question:
    """What is to be decided."""

    asked: Asked
    """Model, context, device, formats and GPUs; its mechanism does not matter."""
    exact: bool = False
    """Whether nothing may be approximated."""
    quality: float | None = None
    """Least share of right answers that an approximation must have in committed evals; None: any."""
    wait: float = WAIT
    """Most seconds until the first token."""
    speed: float = 0.0
    """Least tokens a second of an answer."""


@dataclass(frozen=True)
class Candidate:
    """One way to attend, planned."""

    plan: Plan
    found: Found | None
    """What evals found of it; None: nothing, or nothing is asked since it is exact."""
    against: tuple[str, ...]
    """Why it is out, the worst first."""
    limits: tuple[str, ...]
    """Which limits it misses that may be relaxed."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        asked = self.plan.asked
        narrow = "" if asked.kv == formats.kv("auto", asked.weights) else f", KV {asked.kv}"
        placed = "" if asked.placement is None else f" over {asked.ranks.count} GPUs by {asked.placement.name}"
        return f"{asked.attention}{narrow}{placed}"

    @property
    def exact(self) -> bool:
        """Whether it computes dense attention itself on numbers as they are."""
        asked = self.plan.asked
        placed = asked.placement is None or asked.placement.exact
        return mechanism(asked.attention).exact and placed and asked.kv == formats.kv("auto", asked.weights)

    @property
    def seconds(self) -> float:
        """Seconds of reading and of one answer, at worst."""
        return self.plan.prefill.high + ANSWER * self.plan.step.high

    @property
    def across(self) -> float:
        """Bytes that the busiest GPU sends to another node."""
        return 0.0 if self.plan.sent is None else self.plan.sent.across

    def why(self) -> str:
        """Return what speaks for it."""
        held, room = self.plan.memory.total - self.plan.memory.rotated, self.plan.asked.device.memory
        told = [
            f"fits ({words.size(held)} of {words.size(room)})",
            f"first token after {words.time(self.plan.first_token)}",
        ]
        told.append(words.speed(*self.plan.decode_tokens_per_s))
        if self.exact:
            told.insert(0, "exact")
        elif self.found is not None:
            told.insert(0, self.found.told)
        else:
            told.insert(0, "no eval is committed of it")
        return ", ".join(told)


@dataclass(frozen=True)
class Decision:
    """What was decided, and why."""

    question: Question
    choice: Candidate | None
    """None: nothing fits, or nothing is exact that fits."""
    runner_up: Candidate | None
    relaxed: tuple[str, ...]
    """Limits that nothing meets, and that were left out."""
    out: tuple[Candidate, ...]

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        asked = self.question.asked
        return {
            "model": asked.model.name,
            "context": asked.context,
            "device": asked.device.name,
            "gpus": asked.ranks.gpus,
            "nodes": asked.ranks.nodes,
            "exact": self.question.exact,
            "quality": self.question.quality,
            "wait": self.question.wait,
            "choice": None if self.choice is None else _told(self.choice),
            "runner_up": None if self.runner_up is None else _told(self.runner_up),
            "relaxed": list(self.relaxed),
            "out": [{"name": each.name, "because": list(each.against or each.limits)} for each in self.out],
        }


def question(
    model: str | Mapping[str, Any] = "llama-3.1-8b",
    context: int | str = "128K",
    *,
    gpu: str = "h100",
    gpus: int = 1,
    nodes: int = 1,
    network: float = NETWORK,
    weights: str = "auto",
    exact: bool = False,
    quality: float | None = None,
    wait: float = WAIT,
    speed: float = 0.0,
) -> Question:
    """Return a question, checked; arguments as for `plan`, and those of `Question` (UsageError, ModelError)."""
    if quality is not None and not 0 < quality <= 1:
        raise UsageError(f"quality={quality} must be a share of right answers above 0 and up to 1")
    if not wait > 0 or not 0 <= speed < math.inf:
        raise UsageError(f"wait={wait} and speed={speed} must be numbers, wait more than 0")
    asked = plan.asked(
        model, context, attention="dense", weights=weights, kv="auto", gpu=gpu,
        ranks=plan.ranks(gpus, nodes, network), placement="auto", concurrent=1, chunk=None,
    )  # fmt: skip
    return Question(asked, exact, quality, wait, speed)


def decide(given: Question) -> Decision:
    """Return the best way to attend, the next best, and why the others are out."""
    candidates = [_judged(given, asked) for asked in _ways(given.asked)]
    possible = [each for each in candidates if not each.against]
    meeting = [each for each in possible if not each.limits]
    relaxed: tuple[str, ...] = ()
    if possible and not meeting:
        # Nothing meets every limit: then what comes nearest is better than what is exact.
        meeting = possible
        relaxed = min(meeting, key=_order(meeting, late=True)).limits
    ranked = sorted(meeting, key=_order(meeting, late=bool(relaxed)))
    if ranked:
        ranked = _least_sent(ranked)
    others = [each for each in sorted(possible, key=_order(possible)) if each not in ranked]
    runner_up = next(iter([*ranked[1:], *others]), None)
    out = tuple(each for each in candidates if each not in ranked[:1] and each is not runner_up)
    return Decision(given, ranked[0] if ranked else None, runner_up, relaxed, out)


def _ways(asked: Asked) -> Iterator[Asked]:
    """Yield every mechanism, by every placement that serves it, in narrower formats where it would not fit."""
    from longspan.attention import names

    own = formats.kv("auto", asked.weights)
    for name in names():
        placements = [each for each in parallel.PLACEMENTS.values() if parallel.fits(each, name)]
        placed = [replace(asked, attention=name, placement=None, ranks=Ranks(network=asked.ranks.network))]
        if asked.ranks.count > 1 and placements:
            placed = [replace(asked, attention=name, placement=each) for each in placements]
        for way in placed:
            for kv in (own, *_NARROW):
                tried = replace(way, kv=kv, rotated=False)
                yield tried
                if tried.memory().total <= tried.device.memory:
                    break


def _judged(given: Question, asked: Asked) -> Candidate:
    """Return a way with what speaks against it."""
    chosen, made = mechanism(asked.attention), plan.planned(asked)
    narrow = None if asked.kv == formats.kv("auto", asked.weights) else asked.kv
    found = None if chosen.exact and narrow is None else evidence.of(asked.attention, narrow, asked.context)
    candidate = Candidate(made, found, (), ())
    against, limits = [], []
    lacking = made.memory.total - asked.device.memory
    if lacking > 0:
        against.append(f"does not fit: {words.size(lacking)} lack")
    if chosen.needs_training:
        against.append("needs a model trained with it")
    if given.exact and not candidate.exact:
        against.append("approximates")
    trained = asked.model.trained
    if not given.exact and trained is not None and asked.context > trained and not chosen.beyond_window:
        against.append(f"reads beyond the {short(trained)} tokens that {asked.model.name} was trained for")
    if given.quality is not None and not candidate.exact:
        if found is None:
            against.append("no eval is committed of it")
        elif found.score < given.quality:
            against.append(f"{found.told}: less than {100 * given.quality:.0f} %")
    if made.first_token.high > given.wait:
        limits.append(f"first token after {words.time(made.first_token)}, not {words.seconds(given.wait)}")
    if made.decode_tokens_per_s[0] < given.speed:
        limits.append(f"{words.speed(*made.decode_tokens_per_s)}, not {words.digits(given.speed)}")
    return replace(candidate, against=tuple(against), limits=tuple(limits))


def _order(candidates: list[Candidate], *, late: bool = False) -> Callable[[Candidate], tuple[int, int, float]]:
    """Return the key that sorts candidates, the best first; `late`: where all take too long."""
    best = max((each.found.low for each in candidates if each.found is not None), default=0.0)

    def key(each: Candidate) -> tuple[int, int, float]:
        # What may be as good as the best, by its interval, is as good.
        good = each.found is not None and each.found.high >= best and each.found.score > 0
        return (
            0 if each.exact or late else 1,
            0 if each.exact or good else 1 if each.found is None else 2,
            each.seconds,
        )

    return key


def _least_sent(ranked: list[Candidate]) -> list[Candidate]:
    """Return candidates with that first which, among those as good and about as fast as the first, sends least."""
    first = ranked[0]
    equal = [
        each for each in ranked if each.exact == first.exact and each.plan.asked.attention == first.plan.asked.attention
    ]
    equal = [
        each for each in equal if each.seconds <= _EQUAL * first.seconds and each.plan.asked.kv == first.plan.asked.kv
    ]
    best = min(equal, key=lambda each: each.across)
    return [best, *(each for each in ranked if each is not best)]


def _told(given: Candidate) -> dict[str, Any]:
    asked = given.plan.asked
    return {
        "name": given.name,
        "attention": asked.attention,
        "placement": None if asked.placement is None else asked.placement.name,
        "kv": asked.kv,
        "exact": given.exact,
        "why": given.why(),
        "first_token_seconds": [given.plan.first_token.low, given.plan.first_token.high],
        "decode_tokens_per_s": list(given.plan.decode_tokens_per_s),
        "by": given.plan.by,
    }
