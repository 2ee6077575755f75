"""The context that keeps every layer's keys and values, and attends by its mechanism."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, make
from longspan.attention.rebalance import PageMass, rebalance
from longspan.engine.contexts import Context, Tick, kv_head, paged, restore_layers
from longspan.errors import PoolExhaustedError, UsageError
from longspan.hf.attention import Enough
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget, size
from longspan.kv.pages import PagedKV
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import Head, RetrievalHeads

PREFILL_WINDOW = 1024
"""Newest keys that a query of a document sees beyond the trained length where no prefill was chosen."""


class KVContext(Context):
    """Keeps every layer's keys and values."""

    def __init__(
        self,
        model: CausalModel,
        mechanism: Mechanism,
        prefill: Mechanism | None = None,
        *,
        kv_format: str | None = None,
        budget: Budget | None = None,
        summaries: Sequence[str] | None = None,
    ) -> None:
        """Start empty.

        Args:
            model: whose layers' keys and values are kept.
            mechanism: by what queries attend.
            prefill: by what documents are read; see `prefill`.
            kv_format: format of full pages (`kv.formats.names()`); None: the model's number type.
            budget: bytes that all layers' pages may take together; None: no limit.
            summaries: which summaries pages keep up to date; None: those that the mechanism reads.

        Raises:
            UnknownNameError, UsageError: no such format, or one that does not suit the model's number type.
            UsageError: a budget below one page a layer.
        """
        super().__init__(model, mechanism)
        kinds = mechanism.summaries if summaries is None else tuple(summaries)
        self.budget = Budget() if budget is None else budget
        self.layers = [
            paged(model, kv_format, self.budget, kinds, mechanism.block) for _ in range(model.dimensions.layers)
        ]
        self.budget.require(
            sum(kv.pool.least_bytes for kv in self.layers), f"one page for each of {len(self.layers)} layers"
        )
        self._committed = 0
        self._masses: list[PageMass] = []
        """How much attention pages get, a layer, where a budget decides by it which of them stay exact."""
        if self._adapts:
            self._masses = [PageMass() for _ in self.layers]
            for kv, mass in zip(self.layers, self._masses, strict=True):
                kv.mass = mass
        self.hints = Hints()
        """What the mechanism is told at the next step: the pages chosen for a question."""
        if prefill is not None and mechanism.bounded_memory and not prefill.bounded_memory:
            raise UsageError(
                f"{mechanism.name} drops what --prefill {prefill.name} would have to read: leave out --prefill, or "
                "give an attention that keeps everything"
            )
        if prefill is not None and self._adapts and not (prefill.adapts or prefill.bounded_memory):
            raise UsageError(
                f"under a KV budget {mechanism.name} holds cold pages as summaries, which --prefill {prefill.name} "
                "can't read: leave out --prefill or --kv-budget"
            )
        self.prefill = prefill
        """By what documents are read; None: by the mechanism, or as `reads_by` says where that only decodes."""

    def reads_by(self, stop: int) -> Mechanism:
        """See `Context`. What chooses in decode only reads densely up to the trained length, by a window beyond."""
        if self.prefill is not None:
            return self.prefill
        if self.mechanism.prefills:
            return self.mechanism
        if stop > self.model.dimensions.window or self._adapts or any(kv.readable() is not None for kv in self.layers):
            # Beyond the trained length; or where pages are, or may be, held as summaries that only it does not need.
            return _newest()
        return make("dense")

    def dropped(self, length: int) -> tuple[int, int]:
        """See `Context`: what reads documents may look further back than what answers."""
        start, stop = self.mechanism.dropped(length)
        if self.prefill is not None:
            first, last = self.prefill.dropped(length)
            start, stop = max(start, first), min(stop, last)
        return (start, stop) if start < stop else (0, 0)

    @property
    def nbytes(self) -> int:
        """See `Context`."""
        return sum(kv.nbytes for kv in self.layers)

    @property
    def beyond_window(self) -> bool:
        """Whether positions stay within what the model was trained on, however long the context."""
        return self.mechanism.beyond_window and (self.prefill is None or self.prefill.beyond_window)

    @property
    def _adapts(self) -> bool:
        return self.mechanism.adapts and self.budget.limited

    def _settle(self, new: int) -> None:
        """Make room for new tokens within the budget: the coldest pages are held as summaries, hot ones come back.

        Demoted pages leave an exact copy in host memory, which no budget counts.

        Raises:
            PoolExhaustedError: the budget does not hold what must stay exact.
        """
        spent, left = sum(kv.nbytes for kv in self.layers), self.budget.left
        assert left is not None, "only a limited budget is settled"
        pages = -(-(self.length + new) // PAGE)
        # Documents and questions may be read by different mechanisms: what either of them reads exactly stays.
        readers = (self.mechanism, self.prefill or _newest())
        sinks = max(int(getattr(reader, "sinks", 0)) for reader in readers)
        window = max(int(getattr(reader, "window", 0)) for reader in readers)
        # What may be taken back must stay, and a window's first page may be cut.
        window += 2 * PAGE + self.length - self._committed
        for kv, mass in zip(self.layers, self._masses, strict=True):
            pool = kv.pool
            share = (spent + left) // len(self.layers) - pages * pool.marks.page_bytes
            now = len(kv.table)
            page_bytes = pool.plane(pool.format.name).page_bytes
            # Two pages in the model's own type: the one being filled, and one that a question may reopen.
            held = (share - 2 * pool.native.page_bytes) // page_bytes - (pages - now)
            try:
                with Undisturbed():
                    rebalance(kv, mass.pages(now), held, sinks=sinks, window=window)
            except UsageError as error:
                raise PoolExhaustedError(
                    f"the {self.budget.root.name} budget of {size(spent + left)} does not hold the newest "
                    f"{window} tokens of every layer: raise it (--kv-budget)"
                ) from error

    def fork(self, budget: Budget | None = None) -> KVContext:
        """Return a context that has read the same tokens and shares every page until one of the two writes to it.

        Args:
            budget: the fork's own, under the same root; None: like this context's.

        Raises:
            PoolExhaustedError: what it would refer to is more than its budget has left.
        """
        if budget is None:
            own = self.budget
            budget = own if own.parent is None else Budget(own.limit, own.name, own.parent)
        other = copy.copy(self)
        other.tokens, other.budget, other.layers = list(self.tokens), budget, []
        try:
            for kv in self.layers:
                other.layers.append(kv.fork(budget))
            other._masses = copy.deepcopy(self._masses)
            for kv, mass in zip(other.layers, other._masses, strict=False):
                kv.mass = mass
        except BaseException:
            for kv in other.layers:
                kv.free()
            raise
        return other

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`."""
        before = self.length
        asked = _Asked(self.layers, self.mechanism, heads, self.hints)
        if self._adapts:
            self._settle(len(question))
        try:
            self.model.forward(question, asked)
        finally:
            self.truncate(before)
        start, stop = self.dropped(before)
        # The first page that is held whole again; nothing before it is asked for.
        first = min(-(-stop // PAGE) * PAGE, before) if stop > start else 0
        keys = {
            head: self.layers[head[0]].known_keys(first, before)[0, kv_head(self.model, head)] for head in heads.heads
        }
        found = token_mass(asked.queries, keys, sinks=heads.sinks if first == 0 else 0)
        return torch.nn.functional.pad(found, (first, 0))

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        return {name: tensor for i, kv in enumerate(self.layers) for name, tensor in kv.tensors(f"{i}.").items()}

    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """See `Context`."""
        restore_layers(self.layers, len(tokens), tensors)
        self.tokens = list(tokens)
        self._committed = self.length
        if not self.budget.limited:
            # What a budget had demoted need not stay so without one.
            for kv in self.layers:
                kv.promote(sorted(kv.exact))

    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        before = self.length
        reader = _Attending(self.layers, mechanism or self.mechanism, self.hints)
        if self._adapts:
            self._settle(len(chunk))
        try:
            out = self.model.forward(chunk, reader, logits=logits)
            self.tokens.extend(chunk)
        except BaseException:
            self.truncate(before)
            raise
        return out

    def truncate(self, length: int) -> None:
        """See `Context`."""
        super().truncate(length)
        self._committed = min(self._committed, length)
        for mass in self._masses:
            mass.truncate(length // PAGE)

    def _commit(self) -> None:
        super()._commit()
        self._committed = self.length

    def _layers(self) -> Sequence[PagedKV]:
        return self.layers


class _Attending:
    """A reader that appends to every layer's pages and attends by the mechanism."""

    def __init__(self, layers: Sequence[PagedKV], mechanism: Mechanism, hints: Hints) -> None:
        self.layers, self.mechanism, self.hints = layers, mechanism, hints

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kv = self.layers[layer]
        with Undisturbed():
            kv.append(k, v)
        return self.mechanism.attend(q, kv, scale=scale, hints=replace(self.hints, layer=layer))


class _Asked(_Attending):
    """A reader that also notes the retrieval heads' queries, and stops once it has them all."""

    def __init__(self, layers: Sequence[PagedKV], mechanism: Mechanism, heads: RetrievalHeads, hints: Hints) -> None:
        super().__init__(layers, mechanism, hints)
        self.heads = heads
        self.last = max(layer for layer, _ in heads.heads)
        self.queries: dict[Head, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for head in self.heads.heads:
            if head[0] == layer:
                self.queries[head] = q[0, head[1]].float() * scale
        if layer == self.last:
            raise Enough
        return super().attend(layer, q, k, v, scale)


def _newest() -> Mechanism:
    """Return what reads documents where dense attention can't: sinks and a window."""
    return make("streaming", window=PREFILL_WINDOW)
