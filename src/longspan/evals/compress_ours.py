"""Our side of a comparison of ways to compress: mechanisms and formats, through the engine's own contexts.

What reads a document alike at every ratio reads it once: the copy of each ratio shares its pages and then evicts
(`Readings`). The answers to all questions are written together (`together.py`). Where eviction waits for the question,
the last tokens of a text stand for one. What is kept and what is asked: `compress.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.nn.functional import cross_entropy

from longspan.attention import Mechanism, make, parse
from longspan.attention.evicting import Evicting
from longspan.engine.contexts import paged
from longspan.engine.kept_layers import KeptLayers
from longspan.engine.kv_context import KVContext
from longspan.errors import UsageError
from longspan.evals.compress import DENSE, Case, Outcome, paired
from longspan.evals.questions.scoring import score
from longspan.evals.together import continued
from longspan.hf.model import CausalModel
from longspan.kv import formats
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.kept import KeptKV
from longspan.kv.pages import PagedKV

ASKED = 64
"""Last tokens of a text that stand for its question, where eviction waits for one."""

_STACKED = {"cpu": 1 << 30, "cuda": 4 << 30}
"""Bytes of keys and values that are answered from together."""


@dataclass(frozen=True)
class Way:
    """One of our ways at one ratio."""

    mechanism: Mechanism
    kv_format: str | None = None
    ratio: float | None = None
    """Dense's bytes of a context over those that it may keep, where the mechanism can be told; None: it can't."""

    def describe(self) -> str:
        """Return it in words."""
        return self.mechanism.describe() + (f" +{self.kv_format}" if self.kv_format else "")


class Readings:
    """Contexts as they were read, of the latest way alone."""

    def __init__(self, model: CausalModel) -> None:
        """Start with none."""
        self.model = model
        self._of: tuple[Mechanism, str | None] | None = None
        self._known: dict[tuple[int, ...], KVContext] = {}

    def read(self, way: Way, tokens: Sequence[int]) -> KVContext:
        """Return a context that has read tokens and keeps what the way keeps of them; the caller frees it."""
        mechanism = way.mechanism
        dense = _layer_bytes(self.model, make(DENSE), None, len(tokens)) * self.model.dimensions.layers
        allowed = None if way.ratio is None else int(dense / way.ratio)
        whole = cast("Evicting", mechanism).unevicted(len(tokens)) if mechanism.evicts else None
        if whole is None:
            context = KVContext(self.model, mechanism, kv_format=way.kv_format)
            context.extend(tokens)
            if context.kept is not None and allowed is not None:
                context.kept.shrink(len(tokens), allowed)
        else:
            context = self._whole(whole, way.kv_format, tokens).fork()
            assert context.kept is not None, "what evicts has layers of its own kind"
            context.kept.settles = True
            context.evict_by(cast("Evicting", mechanism), allowed)
        return context

    def _whole(self, mechanism: Mechanism, kv_format: str | None, tokens: Sequence[int]) -> KVContext:
        key = tuple(tokens)
        if self._of != (mechanism, kv_format):
            for context in self._known.values():
                context.free()
            self._of, self._known = (mechanism, kv_format), {}
        if key not in self._known:
            self._known[key] = context = KVContext(self.model, mechanism, kv_format=kv_format)
            assert context.kept is not None, "what evicts has layers of its own kind"
            context.kept.settles = False  # each copy writes down what it keeps
            context.extend(tokens)
        return self._known[key]


class Ours:
    """A mechanism of ours over pages of some format."""

    def __init__(self, model: CausalModel, way: Way, readings: Readings | None = None) -> None:
        """Take what each context is made with; `readings` are shared by ways that come one after the other."""
        self.model, self.way = model, way
        self.readings = Readings(model) if readings is None else readings

    def run(self, cases: Sequence[Case], continuations: Sequence[Sequence[int]]) -> list[Outcome]:
        """See `compress.Runner`."""
        outcomes: list[Outcome | None] = [None] * len(cases)
        waiting: list[tuple[int, KVContext, int]] = []
        most = _STACKED["cuda" if self.model.device.type == "cuda" else "cpu"]
        try:
            for i, (case, continuation) in enumerate(paired(cases, continuations)):
                context = self.readings.read(self.way, self._context(case))
                if case.question is None:
                    outcomes[i] = self._scored(context, case, continuation)
                    context.free()
                    continue
                waiting.append((i, context, context.nbytes))
                if sum(kept for _, _, kept in waiting) >= most:
                    self._answer(waiting, cases, outcomes)
            self._answer(waiting, cases, outcomes)
        finally:
            for _, context, _ in waiting:
                context.free()
        return [outcome for outcome in outcomes if outcome is not None]

    def continued(self, case: Case, count: int) -> list[int]:
        """Return the greedy continuation of a text."""
        context = self.readings.read(self.way, self._context(case))
        try:
            first = int(context.step([*self._asked(case), case.follows[0]]).argmax())
            return continued(self.model, [context], [first], count, lambda _, written: len(written) == count)[0]
        finally:
            context.free()

    @property
    def _per_question(self) -> bool:
        return self.way.mechanism.evicts and cast("Evicting", self.way.mechanism).per_question

    def _context(self, case: Case) -> list[int]:
        return case.tokens[: len(case.tokens) - len(self._asked(case))]

    def _asked(self, case: Case) -> list[int]:
        """Return the tokens of a text that stand for its question."""
        return case.tokens[-ASKED:] if self._per_question and case.question is None else []

    def _scored(self, context: KVContext, case: Case, continuation: Sequence[int]) -> Outcome:
        kept = context.nbytes
        if asked := self._asked(case):
            context.step(asked)
            kept = context.nbytes
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

    def _answer(
        self, waiting: list[tuple[int, KVContext, int]], cases: Sequence[Case], outcomes: list[Outcome | None]
    ) -> None:
        """Answer the questions of these contexts, and free them."""
        if not waiting:
            return
        questions = [cases[i].question for i, _, _ in waiting]
        asked = [question for question in questions if question is not None]
        contexts = [context for _, context, _ in waiting]
        first, kept = [], []
        for question, (_, context, before) in zip(asked, waiting, strict=True):
            first.append(int(context.step(question.tokens).argmax()))
            kept.append(context.nbytes if self._per_question else before)

        def done(i: int, written: list[int]) -> bool:
            if written[-1] in self.model.end_tokens or len(written) == asked[i].max_tokens:
                return True
            return score(self.model.decode(written), asked[i].outputs, asked[i].scoring) == 1

        most = max(question.max_tokens for question in asked)
        written = continued(self.model, contexts, first, most, done)
        for (i, context, _), nbytes, tokens in zip(waiting, kept, written, strict=True):
            said = tokens[:-1] if tokens[-1] in self.model.end_tokens else tokens
            outcomes[i] = Outcome(nbytes, answer=self.model.decode(said))
            context.free()
        waiting.clear()


def within(model: CausalModel, way: str, ratio: float, length: int) -> Way:
    """Return one of our ways so that it keeps at most `1/ratio` of dense's bytes.

    A format alone may keep a seventh more, for its scales; nobody could name a ratio that it keeps exactly.

    Args:
        model: whose layers are compressed.
        way: a mechanism, a format of pages, or both with `+` between.
        ratio: dense's bytes over those kept.
        length: tokens of the context.

    Raises:
        UsageError: no such mechanism or format, it can't keep so little, or its format alone does.
    """
    spec, _, kv_format = way.rpartition("+") if "+" in way else (way, "", "")
    if not kv_format and spec.partition(":")[0] in formats.names():
        spec, kv_format = DENSE, spec
    mechanism, held = parse(spec), kv_format or None
    allowed = _layer_bytes(model, make(DENSE), None, length) / ratio
    if not mechanism.evicts and not mechanism.bounded_memory:
        # Every key is kept. What reads only some of them reads what it was told to: a ratio says nothing of that.
        if _layer_bytes(model, mechanism, held, length) > allowed * 8 / 7:
            raise UsageError(f"{way} keeps more than 1/{ratio:g}")
        return Way(mechanism, held)
    # What waits for the question keeps as much on its copy as others keep in all.
    sized = replace(cast("Evicting", mechanism), when="document") if mechanism.evicts else mechanism
    if sized == mechanism and _layer_bytes(model, make(DENSE), held, length) <= allowed:
        if held:
            raise UsageError(f"{held} alone keeps no more than 1/{ratio:g}: nothing would be evicted")
        return Way(make(DENSE))
    least, most = PAGE, length
    if _layer_bytes(model, sized.within(least, length), held, length) > allowed:
        raise UsageError(f"{way} keeps more than 1/{ratio:g}")
    while least + 1 < most:
        middle = (least + most) // 2
        if _layer_bytes(model, sized.within(middle, length), held, length) <= allowed:
            least = middle
        else:
            most = middle
    if not mechanism.evicts or cast("Evicting", mechanism).per_question:
        return Way(mechanism.within(least, length), held)
    # On the way a page more may be held than fits every layer: in the end layers shrink to the bytes allowed.
    keys = -(-(least + 1) // PAGE) * PAGE
    return Way(mechanism.within(keys, length), held, ratio)


def _layer_bytes(model: CausalModel, mechanism: Mechanism, kv_format: str | None, length: int) -> float:
    """Return the bytes that a layer keeps of `length` tokens, counted on a layer that holds as many rows.

    Page tables and formats are the real ones; what is in the pages does not matter.
    """
    sizes = model.dimensions
    cost = mechanism.cost(length, sizes.shape(model.dtype.itemsize))
    token = sizes.shape(model.dtype.itemsize).token_bytes
    kept = KeptLayers.of(model, mechanism, kv_format, Budget())
    dropped = mechanism.dropped(length)
    if kept is None:
        rows = length if dropped != (0, 0) else min(length, round(cost.kept_bytes / token))
        layer: KeptKV | PagedKV = paged(model, kv_format, layer=0)
        beside = 0.0
    else:
        rows = min(length, kept.mechanism.keeps(length))
        layer = kept.layers[0]
        beside = cost.kept_bytes - rows * token  # positions, and what was learned
    blank = torch.zeros(1, sizes.kv_heads, rows, sizes.head_dim, dtype=model.dtype, device=model.device)
    layer.append(blank, blank)
    layer.commit()
    if isinstance(layer, KeptKV):
        layer.settle()
    layer.drop(*dropped)
    # A trial's own positions are not those of rows that were evicted: the cost counts them.
    pages = layer.page_bytes if isinstance(layer, KeptKV) else layer.nbytes
    layer.free()
    return pages + beside
