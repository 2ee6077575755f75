"""The context that keeps the keys of the retrieval heads, and a window of the layers below them.

That is enough to choose pages; the chosen ones are read again elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.attention.retrieval import Retrieval
from longspan.engine.contexts import Context, Tick, kv_head, newest, paged, restore_layers
from longspan.engine.readers import read_by
from longspan.engine.recurrence import Recurrence
from longspan.errors import SessionCorruptError
from longspan.hf.attention import Enough
from longspan.hf.model import CausalModel
from longspan.kv.pages import PagedKV
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import Head, RetrievalHeads


class IndexContext(Context):
    """Keeps the keys of the retrieval heads, and a window of the layers below them."""

    def __init__(self, model: CausalModel, mechanism: Retrieval, heads: RetrievalHeads) -> None:
        """Start empty. Layers above the highest retrieval head are never run."""
        super().__init__(model, newest(model, mechanism.window, mechanism.sinks))
        self.wanted, self.heads = mechanism, heads
        self.slots = sorted({(layer, kv_head(model, (layer, head))) for layer, head in heads.heads})
        self.last = max(layer for layer, _ in self.slots)
        self.layers = [paged(model, layer=i) for i in range(self.last)]
        self.recurrence = Recurrence(model.states_before(self.last), self.layers, self.chunk)
        # Half precision holds a key well enough to rank pages, and the keys are most of what a session stores.
        kept = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16
        self.index = torch.empty(len(self.slots), 0, model.dimensions.head_dim, dtype=kept, device=model.device)

    @property
    def nbytes(self) -> int:
        """See `Context`."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def beside(self) -> dict[int, int]:
        """See `Context`."""
        return super().beside() | {id(self.index): self.index.nbytes}

    def fork(self) -> IndexContext:
        """See `Context`; the index, 256 bytes a token for the default model, is copied."""
        other = copy.copy(self)
        other.tokens, other.index = list(self.tokens), self.index[:, : self.length].clone()
        other.layers = [kv.fork() for kv in self.layers]
        other.recurrence = self.recurrence.fork()
        return other

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`."""
        assert heads == self.heads, "an index answers for the heads it was made for"
        before = self.length
        reader = _Indexing(self, keep=False)
        try:
            self.model.forward(question, reader, state=self.recurrence.state())
        finally:
            self.truncate(before)
        keys = {
            head: self.index[self.slots.index((head[0], kv_head(self.model, head))), :before] for head in heads.heads
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
        return {**kept, **self.recurrence.tensors()}

    def restore(self, tokens: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """See `Context`."""
        index = tensors.get("index")
        wanted = (len(self.slots), len(tokens), self.index.shape[-1])
        if index is None or tuple(index.shape) != wanted:
            raise SessionCorruptError("the saved index does not fit its tokens: remove the session and read again")
        self.recurrence.restore(len(tokens), tensors, self.model.device)
        restore_layers(self.layers, len(tokens), tensors)
        self.index = index.to(self.index)
        self.tokens = list(tokens)

    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        before = self.length
        self._reserve(before + len(chunk))
        state = self.recurrence.state()
        try:
            self.model.forward(chunk, _Indexing(self, keep=True), state=state)
            self._count(chunk, state)
        except BaseException:
            if self.length == before:
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
        return read_by(context.mechanism, kv).attend(q, kv, scale=scale)
