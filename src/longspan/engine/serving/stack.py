"""The rows of many short contexts side by side, so that one call a layer attends for all of them.

For what reads every row that is held (dense, and windows that hold all), on a CPU: there a call costs more than what it
reads of a few thousand rows. A stack holds one size of context; each is a slot of one tensor, its newest tokens among
its rows and, unrotated, in a tail that is written to the context's pages when it is full or the context leaves. Slots
are closed up, so that those in use come first. It does not know when contexts come and go: `batch.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan.engine.kv_context import KVContext
from longspan.hf.model import CausalModel
from longspan.kernels.partial_attention.cpu import multiplies_bfloat16
from longspan.kv.base import PAGE

TAIL = PAGE
"""Tokens of an answer that wait to be written to pages."""


class Stack:
    """Slots for contexts of up to `room` tokens."""

    def __init__(self, model: CausalModel, room: int) -> None:
        """Start without any."""
        self.model, self.room = model, room
        self.contexts: list[KVContext] = []
        """By slot."""
        self.pending: list[list[int]] = []
        """Tokens of each that its pages do not hold yet."""
        self._rows = torch.empty(0)
        """Rotated keys beside values, `[layers, slots, Hkv, room, 2 D]`."""
        self._tail = torch.empty(0)
        """Unrotated keys, `[layers, slots, Hkv, TAIL, D]`."""
        self._slots = 0

    def length(self, slot: int) -> int:
        """Return the number of tokens of the context in a slot, those among them that wait."""
        return self.contexts[slot].length + len(self.pending[slot])

    def join(self, context: KVContext) -> None:
        """Give a context the next slot."""
        slot, length = len(self.contexts), context.length
        if slot == self._slots:
            self._grow(max(4, 2 * slot))
        dim = self.model.dimensions.head_dim
        for layer, kv in enumerate(context.layers):
            rows = self._rows[layer, slot, :, :length]
            if length:
                rows[..., :dim] = kv.keys_at_own_positions(0, length)[0]
                rows[..., dim:] = kv.values(0, length)[0]
        self.contexts.append(context)
        self.pending.append([])

    def leave(self, slot: int) -> KVContext:
        """Write what waits to the pages of the context in a slot, and close the slot up.

        Raises:
            PoolExhaustedError: there is no room for it; the context is without the tokens that waited.
        """
        try:
            self.write(slot)
        finally:
            last = len(self.contexts) - 1
            context, tokens = self.contexts.pop(), self.pending.pop()
            gone = context
            if slot < last:
                gone, self.contexts[slot], self.pending[slot] = self.contexts[slot], context, tokens
                self._rows[:, slot] = self._rows[:, last]
                self._tail[:, slot] = self._tail[:, last]
            # What is masked must still be a number, whatever a context held.
            self._rows[:, last] = 0.0
        return gone

    def write(self, slot: int) -> None:
        """Write what waits to pages (PoolExhaustedError: it is forgotten instead)."""
        tokens, context = self.pending[slot], self.contexts[slot]
        if not tokens:
            return
        start, count, dim = context.length, len(tokens), self.model.dimensions.head_dim
        self.pending[slot] = []
        context.take_rows(
            tokens,
            [
                (
                    self._tail[layer, slot : slot + 1, :, :count],
                    self._rows[layer, slot : slot + 1, :, start : start + count, dim:],
                )
                for layer in range(len(context.layers))
            ],
        )

    def begin(self) -> Step:
        """Return what the next step's tokens attend by, one for every slot in order; `tokens` are counted by `end`."""
        return Step(self)

    def end(self, tokens: list[int]) -> Iterator[tuple[int, Exception]]:
        """Count the tokens that a step has read; yields the slots whose context has no room for more, and why."""
        for slot, token in enumerate(tokens):
            self.pending[slot].append(token)
            if len(self.pending[slot]) == TAIL:
                try:
                    self.write(slot)
                except Exception as error:
                    yield slot, error

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._rows.nbytes + self._tail.nbytes

    def _grow(self, slots: int) -> None:
        sizes, dtype = self.model.dimensions, self.model.dtype
        with torch.inference_mode(False):
            rows = torch.zeros(sizes.layers, slots, sizes.kv_heads, self.room, 2 * sizes.head_dim, dtype=dtype)
            tail = torch.zeros(sizes.layers, slots, sizes.kv_heads, TAIL, sizes.head_dim, dtype=dtype)
        if self._slots:
            rows[:, : self._slots], tail[:, : self._slots] = self._rows, self._tail
        self._rows, self._tail, self._slots = rows, tail, slots


class Step:
    """One step of all contexts of a stack."""

    def __init__(self, stack: Stack) -> None:
        """Work out once what all layers share: where rows go, what is masked, how queries and keys are turned."""
        self._stack = stack
        count = len(stack.contexts)
        lengths = [stack.length(slot) for slot in range(count)]
        self._at = torch.tensor(lengths)
        self._tail_at = torch.tensor([len(tokens) for tokens in stack.pending])
        self._slots = torch.arange(count)
        self._noted = [(slot, each.noted) for slot, each in enumerate(stack.contexts) if each.noted is not None]
        self._stop = max(lengths) + 1
        dtype = stack.model.dtype
        # In half types that the CPU does not multiply, sums of rounded products would be no better than rounded.
        self._computed = dtype if dtype.itemsize > 2 or multiplies_bfloat16() else torch.float32
        beyond = torch.arange(self._stop) > self._at.unsqueeze(1)
        self._bias = torch.zeros(count, self._stop, dtype=self._computed).masked_fill_(beyond, float("-inf"))
        self._bias = self._bias.view(count, 1, 1, self._stop)
        rotary = stack.model.rotary
        self._angles = None if rotary is None else rotary.angles(self._at.view(-1, 1, 1), torch.empty(0))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Take `[slots, H, 1, D]` of a layer, and return what the queries read; see `hf.attention.Reader`."""
        stack, rotary = self._stack, self._stack.model.rotary
        for slot, noted in self._noted:
            if layer in noted.layers:
                noted.add(layer, q[slot : slot + 1].clone(), scale)  # a view would keep all slots' alive
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
        turned = torch.cat([q, k], 1)
        if rotary is not None and self._angles is not None:
            turned = rotary.turn(turned, self._angles)
        rows = stack._rows[layer]
        rows[self._slots, :, self._at] = torch.cat([turned[:, heads:], v], 3)[:, :, 0]
        stack._tail[layer][self._slots, :, self._tail_at] = k[:, :, 0]
        held = rows[: len(self._slots), :, : self._stop].to(self._computed)
        # The heads of a group are the queries of their KV head: no key is copied.
        grouped = turned[:, :heads].to(self._computed).reshape(-1, kv_heads, heads // kv_heads, dim)
        out = scaled_dot_product_attention(grouped, held[..., :dim], held[..., dim:], self._bias, scale=scale)
        return out.reshape(-1, heads, 1, dim).to(q.dtype)
