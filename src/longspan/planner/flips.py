"""What would change a decision: another context, exactness, a quality floor, patience, GPUs, a slower network.

Each is found by deciding again, not by rules. It prints nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from longspan.lengths import short
from longspan.planner import parallel, words
from longspan.planner.decide import Candidate, Decision, Question, decide
from longspan.planner.devices import devices
from longspan.planner.formats import WEIGHTS
from longspan.planner.parallel import Ranks

_FAR = 64
"""Contexts that are tried: from this many times shorter to as many times longer."""
_PRECISE = 1.02
"""How closely the context is found from which the choice changes."""


@dataclass(frozen=True)
class Flip:
    """A change, and what would be chosen then."""

    when: str
    choice: str

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"when": self.when, "choice": self.choice}


def label(choice: Candidate | None) -> str:
    """Return what distinguishes choices: nothing that fits is one too."""
    return "nothing fits" if choice is None else choice.name


def flips(decision: Decision) -> list[Flip]:
    """Return what would change a decision, each alone."""
    found: list[Flip] = []
    now = label(decision.choice)
    for when, question in _others(decision):
        if (choice := label(decide(question).choice)) != now:
            found.append(Flip(when, choice))
    return found


def _others(decision: Decision) -> Iterator[tuple[str, Question]]:
    """Yield questions that differ in one thing."""
    given = decision.question
    asked = given.asked
    for factor in (0.5, 2.0):
        if (n := change(given, factor)) is not None:
            told = f"from {short(n)} tokens on" if factor > 1 else f"up to {short(n)} tokens"
            yield told, at(given, n)
    yield (
        ("approximations are allowed" if given.exact else "nothing may be approximated"),
        replace(given, exact=not given.exact),
    )
    if (choice := decision.choice) is not None and not choice.exact:
        score = 0.0 if choice.found is None else choice.found.score
        if score < 1:
            floor = min(1.0, score + 0.01)
            yield f"at least {100 * floor:.0f} % must be right in committed evals", replace(given, quality=floor)
    late = [
        each for each in decision.out if each.limits and not each.against and each.plan.first_token.high > given.wait
    ]
    for exact in (True, False):
        if waits := [each.plan.first_token.high for each in late if each.exact is exact]:
            wait = 1.01 * min(waits)
            yield f"the first token may take {words.seconds(wait)}", replace(given, wait=wait)
    if asked.device.gpu:
        for gpus in (1, 2, 8):
            if gpus != asked.ranks.gpus and asked.ranks.nodes == 1:
                ranks = replace(asked.ranks, gpus=gpus)
                yield f"on {gpus} such GPU{'s' if gpus > 1 else ''}", _placed(given, ranks)
    if asked.ranks.nodes > 1:
        slow = replace(asked.ranks, network=asked.ranks.network / 20)
        yield f"with {words.size(slow.network)}/s between nodes", _placed(given, slow)
    if decision.choice is None:
        for weights in list(WEIGHTS)[3:]:
            yield f"with weights in {weights}", replace(given, asked=replace(asked, weights=weights, kv="bf16"))
        larger = [each for each in devices().values() if each.gpu and each.memory > asked.device.memory]
        for device in sorted(larger, key=lambda each: each.memory):
            yield f"on {device.title}", replace(given, asked=replace(asked, device=device))


def _otherwise(given: Question) -> Question:
    return replace(given, exact=not given.exact)


def at(given: Question, n: int) -> Question:
    """Return the same question at another context."""
    return replace(given, asked=replace(given.asked, context=n))


def _placed(given: Question, ranks: Ranks) -> Question:
    placement = parallel.PLACEMENTS["ring"] if ranks.count > 1 else None
    return replace(given, asked=replace(given.asked, ranks=ranks, placement=placement))


def change(given: Question, factor: float) -> int | None:
    """Return the context from which (factor above 1) or up to which (below) something else is chosen; None: none is."""
    now, inside = label(decide(given).choice), given.asked.context
    n = inside
    while (n := round(n * factor)) >= 1000 and 1 / _FAR <= n / given.asked.context <= _FAR:
        if label(decide(at(given, n)).choice) != now:
            return boundary(lambda n: label(decide(at(given, n)).choice) == now, inside, n)
        inside = n
    return None


def boundary(same: Callable[[int], bool], inside: int, outside: int) -> int:
    """Return the context nearest to one that is decided the same at which it is not, to two hundredths."""
    while max(inside, outside) > _PRECISE * min(inside, outside):
        middle = math.isqrt(inside * outside)
        if same(middle):
            inside = middle
        else:
            outside = middle
    return _round(outside, up=outside > inside)


def _round(n: int, *, up: bool) -> int:
    """Return a context to two digits, away from what is decided the same."""
    unit: int = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit if up else max(1, n // unit * unit)
