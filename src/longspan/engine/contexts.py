"""What a model remembers of a context between calls, and how tokens are added to it.

Two kinds. A `KVContext` keeps every layer's keys and values and attends by its mechanism. An `IndexContext` keeps only
the keys of the model's retrieval heads, enough to choose pages, and a window of the lower layers so that reading goes
on; the chosen pages are read again elsewhere. Both grow chunk by chunk: a chunk is added wholly or, if anything
interrupts it, not at all. They do not know documents, questions or templates.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, make
from longspan.attention.rebalance import PageMass, rebalance
from longspan.attention.retrieval import Retrieval
from longspan.errors import PoolExhaustedError, SessionCorruptError, UsageError
from longspan.hf.attention import Enough
from longspan.hf.model import CausalModel
from longspan.kv.base import BLOCK, PAGE
from longspan.kv.budget import Budget, size
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import Head, RetrievalHeads

CHUNK, GPU_CHUNK = 512, 2048
"""Tokens that run through the layers together, on a CPU and on a GPU: working memory is constant in the length of the
context."""

PREFILL_WINDOW = 1024
"""Newest keys that a query of a document sees beyond the trained length where no prefill was chosen."""

Tick = Callable[[int], None]
"""Told how many tokens were just read."""


class Context(ABC):
    """Tokens that a model has read."""

    def __init__(self, model: CausalModel, mechanism: Mechanism) -> None:
        """Start empty."""
        self.model, self.mechanism = model, mechanism
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Number of tokens read."""
        return len(self.tokens)

    @property
    def chunk(self) -> int:
        """Tokens that run through the layers together."""
        return GPU_CHUNK if self.model.device.type == "cuda" else CHUNK

    def reads_by(self, stop: int) -> Mechanism:
        """Return the mechanism by which a chunk of documents is read that ends at `stop`."""
        return self.mechanism

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept for the tokens read."""

    def extend(self, tokens: Sequence[int], tick: Tick = lambda _: None) -> None:
        """Read more tokens for good, in chunks; what the mechanism will never read again is dropped."""
        done = 0
        while done < len(tokens):
            # Chunks end where blocks and pages do, whatever was read before them.
            size = self.chunk - self.length % self.chunk
            chunk = list(tokens[done : done + size])
            self._add(chunk, mechanism=self.reads_by(self.length + len(chunk)))
            self._commit()
            self._drop()
            done += len(chunk)
            tick(len(chunk))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens that may be taken back (`truncate`) and return float32 logits `[V]` for the next one."""
        out: Tensor | None = None
        for start in range(0, len(tokens), self.chunk):
            stop = start + self.chunk
            out = self._add(list(tokens[start:stop]), logits=int(stop >= len(tokens)))
        assert out is not None, "step() needs at least one token"
        return out[-1]

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens that may be taken back, and return the float32 logits `[T, V]` after each of them.

        All of them at once in memory: for a few hundred tokens.
        """
        parts = []
        for start in range(0, len(tokens), self.chunk):
            chunk = list(tokens[start : start + self.chunk])
            parts.append(self._add(chunk, logits=len(chunk)))
        assert parts and all(part is not None for part in parts), "score() needs tokens and a context with logits"
        return torch.cat([part for part in parts if part is not None])

    @abstractmethod
    def fork(self) -> Context:
        """Return a context that has read the same tokens and goes its own way; pages are shared until written to.

        Raises:
            PoolExhaustedError: what it would refer to is more than its budget has left.
        """

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        with Undisturbed():
            for kv in self._layers():
                # A layer that an interrupted chunk did not reach is shorter already.
                kv.truncate(min(length, kv.length))
            del self.tokens[length:]

    @abstractmethod
    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """Return the attention mass `[heads, N]` that a question's tokens put on each token of the context.

        The question is read after the context and taken back. A token of which nothing is held has mass 0.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what must be kept to continue (beside the tokens)."""

    @abstractmethod
    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Continue from what `tensors` returned once (SessionCorruptError if it does not fit)."""

    @abstractmethod
    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        """Read one chunk, wholly or not at all, by this context's mechanism or another."""

    @abstractmethod
    def _layers(self) -> Sequence[PagedKV]:
        """Every layer's pages."""

    def free(self) -> None:
        """Forget everything, and give every page back to whoever shares the pools; forks keep theirs."""
        self.truncate(0)
        for kv in self._layers():
            kv.free()

    def _commit(self) -> None:
        with Undisturbed():
            for kv in self._layers():
                kv.commit()

    def dropped(self, length: int) -> tuple[int, int]:
        """Return the tokens `start .. stop - 1` that nothing reads any more at a context of `length`."""
        return self.mechanism.dropped(length)

    def _drop(self) -> None:
        with Undisturbed():
            for kv in self._layers():
                kv.drop(*self.dropped(self.length))


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
            _paged(model, kv_format, self.budget, kinds, mechanism.block) for _ in range(model.dimensions.layers)
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
            head: self.layers[head[0]].known_keys(first, before)[0, _kv_head(self.model, head)] for head in heads.heads
        }
        found = token_mass(asked.queries, keys, sinks=heads.sinks if first == 0 else 0)
        return torch.nn.functional.pad(found, (first, 0))

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        return {name: tensor for i, kv in enumerate(self.layers) for name, tensor in kv.tensors(f"{i}.").items()}

    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """See `Context`."""
        _restore_layers(self.layers, len(tokens), tensors)
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


class IndexContext(Context):
    """Keeps the keys of the retrieval heads, and a window of the layers below them."""

    def __init__(self, model: CausalModel, mechanism: Retrieval, heads: RetrievalHeads) -> None:
        """Start empty. Layers above the highest retrieval head are never run."""
        super().__init__(model, make("streaming", window=mechanism.window, sinks=mechanism.sinks))
        self.wanted, self.heads = mechanism, heads
        self.slots = sorted({(layer, _kv_head(model, (layer, head))) for layer, head in heads.heads})
        self.last = max(layer for layer, _ in self.slots)
        self.layers = [_paged(model) for _ in range(self.last)]
        # Half precision holds a key well enough to rank pages, and the keys are most of what a session stores.
        kept = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
        self.index = torch.empty(len(self.slots), 0, model.dimensions.head_dim, dtype=kept, device=model.device)

    @property
    def nbytes(self) -> int:
        """See `Context`."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def fork(self) -> IndexContext:
        """See `Context`; the index, 256 bytes a token for the default model, is copied."""
        other = copy.copy(self)
        other.tokens, other.index = list(self.tokens), self.index[:, : self.length].clone()
        other.layers = [kv.fork() for kv in self.layers]
        return other

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`."""
        assert heads == self.heads, "an index answers for the heads it was made for"
        before = self.length
        reader = _Indexing(self, keep=False)
        try:
            self.model.forward(question, reader)
        finally:
            self.truncate(before)
        keys = {
            head: self.index[self.slots.index((head[0], _kv_head(self.model, head))), :before] for head in heads.heads
        }
        # Of a text that is shorter than the sinks, its last token can still be found.
        return token_mass(reader.queries, keys, sinks=min(heads.sinks, max(0, before - 1)))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Not to be had: upper layers are never run, so there are no logits."""
        raise AssertionError("an index has no logits: chosen pages are read again in a context of their own")

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        kept = {"index": self.index[:, : self.length]}
        for i, kv in enumerate(self.layers):
            kept.update(kv.tensors(f"{i}."))
        return kept

    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """See `Context`."""
        index = tensors.get("index")
        wanted = (len(self.slots), len(tokens), self.index.shape[-1])
        if index is None or tuple(index.shape) != wanted:
            raise SessionCorruptError("the saved index does not fit its tokens: remove the session and read again")
        _restore_layers(self.layers, len(tokens), tensors)
        self.index = index.to(self.index)
        self.tokens = list(tokens)

    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        before = self.length
        self._reserve(before + len(chunk))
        try:
            self.model.forward(chunk, _Indexing(self, keep=True))
            self.tokens.extend(chunk)
        except BaseException:
            self.truncate(before)
            raise
        return None

    def _reserve(self, length: int) -> None:
        if length > self.index.shape[1]:
            grown = self.index.new_empty(len(self.slots), max(4096, length + length // 2), self.index.shape[2])
            grown[:, : self.length] = self.index[:, : self.length]
            self.index = grown

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


class _Indexing:
    """A reader that keeps (or, for a question, asks with) the retrieval heads, and stops at the highest of them."""

    def __init__(self, context: IndexContext, *, keep: bool) -> None:
        self.context, self.keep = context, keep
        self.queries: dict[Head, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        context = self.context
        if self.keep:
            start = context.length
            for slot, (at, head) in enumerate(context.slots):
                if at == layer:
                    context.index[slot, start : start + k.shape[2]] = k[0, head].to(context.index.dtype)
        else:
            for at, head in context.heads.heads:
                if at == layer:
                    self.queries[at, head] = q[0, head].float() * scale
        if layer == context.last:
            raise Enough
        kv = context.layers[layer]
        with Undisturbed():
            kv.append(k, v)
        return context.mechanism.attend(q, kv, scale=scale)


def _kv_head(model: CausalModel, head: Head) -> int:
    return head[1] // (model.dimensions.query_heads // model.dimensions.kv_heads)


def _paged(
    model: CausalModel,
    kv_format: str | None = None,
    budget: Budget | None = None,
    summaries: Sequence[str] = (),
    block: int = PAGE,
) -> PagedKV:
    sizes = model.dimensions
    pool = PagePool(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim,
        model.dtype,
        model.device,
        None if budget is None else budget.root,
        kv_format=kv_format,
        summaries=summaries,
        # Blocks larger than a page are put together from pages.
        block=block if PAGE % block == 0 and block % BLOCK == 0 else PAGE,
    )
    return PagedKV(pool, model.rotary, budget)


def _newest() -> Mechanism:
    """Return what reads documents where dense attention can't: sinks and a window."""
    return make("streaming", window=PREFILL_WINDOW)


def _restore_layers(layers: Sequence[PagedKV], length: int, tensors: dict[str, Tensor]) -> None:
    for i, kv in enumerate(layers):
        kv.restore(f"{i}.", length, tensors)
