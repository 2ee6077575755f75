"""What a model remembers of a context between calls, and how tokens are added to it.

Two kinds. A `KVContext` keeps every layer's keys and values and attends by its mechanism. An `IndexContext` keeps only
the keys of the model's retrieval heads, enough to choose pages, and a window of the lower layers so that reading goes
on; the chosen pages are read again elsewhere. Both grow chunk by chunk: a chunk is added wholly or, if anything
interrupts it, not at all. They do not know documents, questions or templates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, make
from longspan.attention.retrieval import Retrieval
from longspan.errors import SessionCorruptError
from longspan.hf.attention import Enough
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import Head, RetrievalHeads

CHUNK, GPU_CHUNK = 512, 2048
"""Tokens that run through the layers together, on a CPU and on a GPU: working memory is constant in the length of the
context."""

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

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept for the tokens read."""

    def extend(self, tokens: Sequence[int], tick: Tick = lambda _: None) -> None:
        """Read more tokens for good, in chunks; what the mechanism will never read again is dropped."""
        size = self.chunk
        for start in range(0, len(tokens), size):
            chunk = list(tokens[start : start + size])
            self._add(chunk, logits=False)
            self._drop()
            tick(len(chunk))

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens that may be taken back (`truncate`) and return float32 logits `[V]` for the next one."""
        out: Tensor | None = None
        for start in range(0, len(tokens), self.chunk):
            stop = start + self.chunk
            out = self._add(list(tokens[start:stop]), logits=stop >= len(tokens))
        assert out is not None, "step() needs at least one token"
        return out

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
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
    def _add(self, chunk: list[int], *, logits: bool) -> Tensor | None:
        """Read one chunk, wholly or not at all."""

    @abstractmethod
    def _layers(self) -> Sequence[PagedKV]:
        """Every layer's pages."""

    def _drop(self) -> None:
        for kv in self._layers():
            kv.drop(*self.mechanism.dropped(self.length))


class KVContext(Context):
    """Keeps every layer's keys and values."""

    def __init__(self, model: CausalModel, mechanism: Mechanism) -> None:
        """Start empty."""
        super().__init__(model, mechanism)
        self.layers = [_paged(model) for _ in range(model.dimensions.layers)]
        self.hints = Hints()
        """What the mechanism is told at the next step: the pages chosen for a question."""

    @property
    def nbytes(self) -> int:
        """See `Context`."""
        pool = self.layers[0].pool
        per_page = pool.nbytes // max(1, pool.slots)
        return sum(kv.pages_held for kv in self.layers) * per_page

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`."""
        before = self.length
        asked = _Asked(self.layers, self.mechanism, heads, self.hints)
        try:
            self.model.forward(question, asked)
        finally:
            self.truncate(before)
        start, stop = self.mechanism.dropped(before)
        # The first page that is held whole again; nothing before it is asked for.
        first = min(-(-stop // PAGE) * PAGE, before) if stop > start else 0
        keys = {head: self.layers[head[0]].keys(first, before)[0, _kv_head(self.model, head)] for head in heads.heads}
        found = token_mass(asked.queries, keys, sinks=heads.sinks if first == 0 else 0)
        return torch.nn.functional.pad(found, (first, 0))

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        return {name: tensor for i, kv in enumerate(self.layers) for name, tensor in kv.tensors(f"{i}.").items()}

    def restore(self, tokens: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """See `Context`."""
        _restore_layers(self.layers, len(tokens), tensors)
        self.tokens = list(tokens)

    def _add(self, chunk: list[int], *, logits: bool) -> Tensor | None:
        before = self.length
        try:
            out = self.model.forward(chunk, _Attending(self.layers, self.mechanism, self.hints), logits=logits)
        except BaseException:
            self.truncate(before)
            raise
        self.tokens.extend(chunk)
        return out

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
        return token_mass(reader.queries, keys, sinks=heads.sinks)

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

    def _add(self, chunk: list[int], *, logits: bool) -> Tensor | None:
        before = self.length
        self._reserve(before + len(chunk))
        try:
            self.model.forward(chunk, _Indexing(self, keep=True))
        except BaseException:
            self.truncate(before)
            raise
        self.tokens.extend(chunk)
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
        kv.append(k, v)
        return self.mechanism.attend(q, kv, scale=scale, hints=self.hints)


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
        kv.append(k, v)
        return context.mechanism.attend(q, kv, scale=scale)


def _kv_head(model: CausalModel, head: Head) -> int:
    return head[1] // (model.dimensions.query_heads // model.dimensions.kv_heads)


def _paged(model: CausalModel) -> PagedKV:
    sizes = model.dimensions
    pool = PagePool(sizes.kv_heads, sizes.head_dim, sizes.head_dim, model.dtype, model.device)
    return PagedKV(pool, model.rotary)


def _restore_layers(layers: Sequence[PagedKV], length: int, tensors: dict[str, Tensor]) -> None:
    for i, kv in enumerate(layers):
        kv.restore(f"{i}.", length, tensors)
