"""What is lost when fewer bytes are kept: ways to compress a context side by side, ours and a peer's, at equal bytes.

Every context is read before its question is known, compressed, and then asked:

- the questions of some RULER tasks (arXiv 2404.06654), scored from 0 to 1;
- the next tokens of plain prose: perplexity;
- dense's own greedy continuation of that prose: how often the likeliest token is the same (agreement).

A ratio r allows `1/r` of the bytes that dense attention keeps in the model's own number type. A way of ours is a
mechanism, a format of pages, or both (`snapkv+int4`): the format takes its share of r, eviction the rest. Kept bytes
are counted, not assumed: positions, scales and unfilled pages as well. A peer gets the same tokens, and keeps `1/r` of
the keys. It does not measure speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from longspan.attention import Mechanism, make, parse
from longspan.engine.contexts import paged
from longspan.engine.kept_layers import KeptLayers
from longspan.engine.kv_context import KVContext
from longspan.errors import UsageError
from longspan.evals.asking.local import template_of
from longspan.evals.questions.making import examples
from longspan.evals.questions.scoring import averaged, score, wilson
from longspan.evals.ruler.tasks import RULER
from longspan.hf.model import CausalModel
from longspan.kv import formats
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.kept import KeptKV
from longspan.kv.pages import PagedKV
from longspan.peers.process import Peer

DENSE = "dense"


@dataclass(frozen=True)
class Question:
    """Something asked of a context, greedily."""

    task: str
    tokens: list[int]
    """What follows the context."""
    outputs: tuple[str, ...]
    scoring: str
    max_tokens: int


@dataclass(frozen=True)
class Case:
    """A context, and what follows it."""

    tokens: list[int]
    question: Question | None = None
    follows: tuple[int, ...] = ()
    """Where there is no question: the context's last token and the text's next ones."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    kept_bytes: int
    answer: str = ""
    nlls: float = 0.0
    """Sum of the negative log-likelihoods of the text's next tokens."""
    likeliest: tuple[int, ...] = ()
    """The likeliest token after each of dense's own."""


@dataclass(frozen=True)
class Row:
    """One way at one ratio."""

    who: str
    """`longspan`, or the peer."""
    way: str
    ratio: float
    """What was asked for."""
    options: str
    kept_bytes: float
    """Mean over the cases."""
    kept_share: float
    """Of the bytes that the same side's dense attention keeps."""
    perplexity: float
    perplexity_ratio: float
    agreement: float
    tasks: dict[str, float]
    score: float
    """Mean of the tasks' scores."""
    low: float
    high: float
    """Its 95 % interval."""


class Runner(Protocol):
    """Compresses contexts in one way, and lets the model go on from them."""

    def run(self, case: Case, continuation: Sequence[int]) -> Outcome:
        """Read a case's context, compress it, and ask or score.

        Args:
            case: what is asked.
            continuation: dense's own greedy continuation of the text, or nothing.
        """
        ...


class Ours:
    """A mechanism of ours over pages of some format."""

    def __init__(self, model: CausalModel, mechanism: Mechanism, kv_format: str | None) -> None:
        """Take what each context is made with."""
        self.model, self.mechanism, self.format = model, mechanism, kv_format

    def run(self, case: Case, continuation: Sequence[int]) -> Outcome:
        """See `Runner`."""
        context = KVContext(self.model, self.mechanism, kv_format=self.format)
        try:
            context.extend(case.tokens)
            kept = context.nbytes
            if case.question is not None:
                return Outcome(kept, answer=self._answer(context, case.question))
            before = context.length
            logits = context.score(list(case.follows))
            wanted = torch.tensor(case.follows[1:], device=logits.device)
            nlls = float(cross_entropy(logits[:-1], wanted, reduction="sum"))
            context.truncate(before)
            likeliest: tuple[int, ...] = ()
            if continuation:
                logits = context.score([case.follows[0], *continuation[:-1]])
                likeliest = tuple(logits.argmax(-1).tolist())
            return Outcome(kept, nlls=nlls, likeliest=likeliest)
        finally:
            context.free()

    def continued(self, case: Case, count: int) -> list[int]:
        """Return the greedy continuation of a text."""
        context = KVContext(self.model, self.mechanism, kv_format=self.format)
        try:
            context.extend(case.tokens)
            written: list[int] = []
            token = case.follows[0]
            for _ in range(count):
                token = int(context.step([token]).argmax())
                written.append(token)
            return written
        finally:
            context.free()

    def _answer(self, context: KVContext, question: Question) -> str:
        written: list[int] = []
        token = int(context.step(question.tokens).argmax())
        while token not in self.model.end_tokens and len(written) < question.max_tokens:
            written.append(token)
            text = self.model.decode(written)
            if score(text, question.outputs, question.scoring) == 1:
                return text
            token = int(context.step([token]).argmax())
        return self.model.decode(written)


class Theirs:
    """A press of a peer."""

    def __init__(self, peer: Peer, model: CausalModel, press: str, ratio: float) -> None:
        """Take who is asked; `press` is empty for dense attention."""
        self.peer, self.model, self.press, self.ratio = peer, model, press, ratio

    def run(self, case: Case, continuation: Sequence[int]) -> Outcome:
        """See `Runner`."""
        asked: dict[str, Any] = {
            "press": self.press,
            "ratio": self.ratio,
            "tokens": case.tokens,
            "score": [],
            "ask": [],
        }
        if case.question is not None:
            wanted = case.question
            asked["ask"] = [{"tokens": wanted.tokens, "max_tokens": wanted.max_tokens, "outputs": wanted.outputs}]
            found = self.peer.ask(asked)
            return Outcome(found["bytes"], answer=self.model.decode(found["answers"][0]))
        asked["score"] = [list(case.follows)]
        if continuation:
            asked["score"].append([case.follows[0], *continuation[:-1]])
        found = self.peer.ask(asked)
        likeliest = tuple(found["scores"][1]["likeliest"]) if continuation else ()
        return Outcome(found["bytes"], nlls=found["scores"][0]["nll"], likeliest=likeliest)


def cases(
    model: CausalModel, text: str, length: int, tasks: Sequence[str], questions: int, texts: int, following: int, *,
    seed: int, longest_answer: int,
) -> list[Case]:  # fmt: skip
    """Return what is asked of every way.

    Args:
        model: whose tokens are counted.
        text: prose, cut into `texts` pieces with distance between them.
        length: tokens of each context.
        tasks: of RULER.
        questions: of each task.
        texts: pieces of prose.
        following: tokens after each piece whose perplexity is taken.
        seed: which questions.
        longest_answer: tokens of an answer at most, where RULER's task allows more.

    Raises:
        UsageError: the text is too short.
    """
    found = []
    template = template_of(model)
    head = model.tokens(template.before)
    for task in tasks:
        for each in examples(RULER, task, model.tokens, length, questions, seed, template=template):
            asked = Question(
                task,
                model.tokens(each.closing),
                each.outputs,
                each.scoring,
                min(each.max_tokens, longest_answer),
            )
            found.append(Case(head + model.tokens(each.context), asked))
    every = model.tokens(text)
    if len(every) < length + following:
        raise UsageError(f"the text has {len(every)} tokens but {length + following} are needed: give more with --doc")
    for i in range(texts):
        start = i * (len(every) - length - following) // max(1, texts)
        piece = every[start : start + length + following]
        found.append(Case(piece[: length - 1], follows=tuple(piece[length - 1 :])))
    return found


def within(model: CausalModel, way: str, ratio: float, length: int) -> tuple[Mechanism, str | None]:
    """Return the mechanism and the format of one of our ways that keep at most `1/ratio` of dense's bytes.

    A format alone may keep a seventh more, for its scales; nobody could name a ratio that it keeps exactly.

    Args:
        model: whose layers are compressed.
        way: a mechanism, a format of pages, or both with `+` between.
        ratio: dense's bytes over those kept.
        length: tokens of the context.

    Raises:
        UsageError: no such mechanism or format, or it can't keep so little.
    """
    spec, _, kv_format = way.rpartition("+") if "+" in way else (way, "", "")
    if not kv_format and spec.partition(":")[0] in formats.names():
        spec, kv_format = DENSE, spec
    mechanism, held = parse(spec), kv_format or None
    allowed = _layer_bytes(model, make(DENSE), None, length) / ratio
    if mechanism.exact:
        if _layer_bytes(model, mechanism, held, length) > allowed * 8 / 7:
            raise UsageError(f"{way} keeps more than 1/{ratio:g}")
        return mechanism, held
    if _layer_bytes(model, make(DENSE), held, length) <= allowed:
        return make(DENSE), held
    least, most = PAGE, length
    if _layer_bytes(model, mechanism.within(least, length), held, length) > allowed:
        raise UsageError(f"{way} keeps more than 1/{ratio:g}")
    while least + 1 < most:
        middle = (least + most) // 2
        if _layer_bytes(model, mechanism.within(middle, length), held, length) <= allowed:
            least = middle
        else:
            most = middle
    return mechanism.within(least, length), held


def _layer_bytes(model: CausalModel, mechanism: Mechanism, kv_format: str | None, length: int) -> float:
    """Return the bytes that a layer keeps of `length` tokens, counted on a layer that holds as many rows.

    Page tables and formats are the real ones; what is in the pages does not matter.
    """
    sizes = model.dimensions
    cost = mechanism.cost(length, sizes.shape(model.dtype.itemsize))
    token = sizes.shape(model.dtype.itemsize).token_bytes
    kept = KeptLayers.of(model, mechanism, kv_format, Budget())
    if kept is None:
        rows = min(length, round(cost.kept_bytes / token))
        layer: KeptKV | PagedKV = paged(model, kv_format)
        beside = 0.0
    else:
        rows = min(length, kept.mechanism.keeps(length))
        layer = kept.layers[0]
        beside = cost.kept_bytes - rows * token  # positions, and what was learned
    blank = torch.zeros(1, sizes.kv_heads, rows, sizes.head_dim, dtype=model.dtype, device=model.device)
    layer.append(blank, blank)
    layer.commit()
    # A trial's own positions are not those of rows that were evicted: the cost counts them.
    pages = layer.page_bytes if isinstance(layer, KeptKV) else layer.nbytes
    layer.free()
    return pages + beside


def measure(
    runner: Runner, all_cases: Sequence[Case], continuations: Sequence[Sequence[int]], tick: Callable[[], None]
) -> Iterator[Outcome]:
    """Yield what comes of each case; `continuations` are dense's own, a text each."""
    texts = iter(continuations)
    for case in all_cases:
        yield runner.run(case, () if case.question is not None else next(texts, ()))
        tick()


def row(
    who: str, way: str, ratio: float, options: str, all_cases: Sequence[Case], outcomes: Sequence[Outcome],
    continuations: Sequence[Sequence[int]], dense: Row | None,
) -> Row:  # fmt: skip
    """Return one way's row; `dense` is that of the same side, None for dense itself."""
    scores: dict[str, list[float]] = {}
    nlls, count, same, said = 0.0, 0, 0, 0
    texts = iter(continuations)
    for case, outcome in zip(all_cases, outcomes, strict=True):
        if case.question is not None:
            found = score(outcome.answer, case.question.outputs, case.question.scoring)
            scores.setdefault(case.question.task, []).append(found)
            continue
        nlls += outcome.nlls
        count += len(case.follows) - 1
        wanted = next(texts)
        same += sum(a == b for a, b in zip(outcome.likeliest, wanted, strict=True))
        said += len(wanted)
    perplexity = math.exp(nlls / count) if count else math.nan
    total = averaged([wilson(each) for each in scores.values()]) if scores else None
    kept = sum(outcome.kept_bytes for outcome in outcomes) / len(outcomes)
    return Row(
        who=who,
        way=way,
        ratio=ratio,
        options=options,
        kept_bytes=round(kept),
        kept_share=round(kept / dense.kept_bytes, 5) if dense else 1.0,
        perplexity=round(perplexity, 4),
        perplexity_ratio=round(perplexity / dense.perplexity, 4) if dense else 1.0,
        agreement=round(same / said, 4) if said else math.nan,
        tasks={task: round(sum(each) / len(each), 4) for task, each in scores.items()},
        score=round(total.mean, 4) if total else math.nan,
        low=round(total.low, 4) if total else math.nan,
        high=round(total.high, 4) if total else math.nan,
    )


def folder_of(model: CausalModel) -> Path:
    """Return the folder that a peer can load the same weights from (UsageError: there is none)."""
    folder = Path(str(getattr(model.config, "_name_or_path", "")))
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model.name} lies in no folder that the peer can load: give --peer-model")
    return folder
