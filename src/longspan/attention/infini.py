"""Infini-attention: dense within a segment, and one matrix a KV head for everything before it, in constant memory.

Leave No Context Behind (arXiv 2404.07143). The context is cut into segments of `segment` tokens. A query at t, in the
segment that begins at token b, reads the keys `b .. t` by softmax (`local`), and a memory of all tokens before b:

    memory = sigma(q) M / (sigma(q) z)                                      equation 3, sigma = ELU + 1
    out    = sigmoid(beta) memory + (1 - sigmoid(beta)) local               equation 6, one beta a query head

with `M [D, Dv]` and `z [D]` of each KV head, read by every query head of its group. When a segment is full, its keys
and values are folded into the memory, all of them against the memory as it was before the segment, and dropped:

    rule="linear"   M += sigma(K)^T V                                       equation 4
    rule="delta"    M += sigma(K)^T (V - sigma(K) M / (sigma(K) z))         equation 5
    both            z += sum over the segment of sigma(K)

Where the paper is silent: the memory of the first segment is empty, `sigma(q) z = 0`, and there is nothing to mix in.
The gate is closed there (`out = local`) instead of scaling `local` by `1 - sigmoid(beta)`, so that a context of one
segment is dense attention, whatever the gates; nor has the delta rule anything to subtract. A sum `sigma(q) z` that is
0 in floating point reads as 0.

Positions: the memory holds keys, and is asked with queries, without positions (the paper's section on position
embeddings). In the segment a key stands at its own position. Rotation makes a score of the distance alone, so counting
from the segment's start would give the same: no distance passes `segment - 1`, however long the context.

An ordinary checkpoint can't read such a memory: gates, and queries and keys that find something in it, are learned.
Everything is differentiable in q, k, v and gates. Gates come in `Hints.gates`; `beta` serves where there are none.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.window import attend_window
from longspan.errors import UsageError
from longspan.kv.base import LayerKV

_ROWS, _GPU_ROWS = 256, 512
"""Queries that attend within their segment together: their scores are in memory at once."""

State = tuple[Tensor, Tensor]
"""`(M [B, Hkv, D, Dv], z [B, Hkv, D])`."""


@dataclass(frozen=True)
class Infini(Mechanism):
    """Reads its segment densely, and what lies before it through a matrix of constant size."""

    segment: int = 2048
    """Tokens that are read exactly together, and then folded into the memory; at most the trained length."""
    rule: str = "delta"
    """How they are folded: `delta` writes only what the memory does not say already, `linear` everything."""
    beta: float = 0.0
    """Gate, before the sigmoid, of every head of a model that has none; 0: memory and segment weigh the same."""

    name: ClassVar[str] = "infini"
    about: ClassVar[str] = "its segment densely, all before it through one matrix a head; trained models only"
    source: ClassVar[str] = "arXiv 2404.07143"
    bounded_memory: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    decode_order: ClassVar[str] = "1"
    # All queries at once: a tile would have to fold again what the one before it had folded.
    tile: ClassVar[int] = sys.maxsize
    gpu_tile: ClassVar[int] = sys.maxsize

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("segment", self.segment, 1)
        one_of("rule", self.rule, ("delta", "linear"))
        if not math.isfinite(self.beta):
            raise UsageError(f"beta={self.beta} must be a finite number")

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        stop = first + q.shape[2]
        beta = q.new_tensor(self.beta) if hints.gates is None else hints.gates.to(q).view(1, -1, 1, 1)
        gate = torch.sigmoid(beta)
        outs, begin = [], first // self.segment * self.segment
        length, state = self._remembered(kv, begin)
        while begin < stop:
            state = self._fold(state, kv, length, begin, q.dtype)
            length = begin
            at, end = max(first, begin), min(stop, begin + self.segment)
            rows = q[:, :, at - first : end - first]
            out = self._local(rows, kv, at, begin, scale)
            if state is not None:
                out = gate * read(rows, state) + (1 - gate) * out
            outs.append(out)
            begin += self.segment
        self._remember(kv, stop, length, state)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _local(self, q: Tensor, kv: LayerKV, first: int, begin: int, scale: float) -> Tensor:
        """Attend from positions `first ..` of one segment to that segment's keys, which begin at `begin`."""
        count = _GPU_ROWS if q.is_cuda else _ROWS
        parts = []
        for start in range(first, first + q.shape[2], count):
            rows = q[:, :, start - first : start - first + count]
            windows = torch.arange(start, start + rows.shape[2]) - begin + 1
            parts.append(attend_window(rows, kv, start, windows, scale)[0])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _fold(self, state: State | None, kv: LayerKV, start: int, stop: int, dtype: torch.dtype) -> State | None:
        """Return the memory of all tokens before `stop`, given that of those before `start`; both begin segments."""
        for begin in range(start, stop, self.segment):
            k, v = (part(begin, begin + self.segment).to(dtype) for part in (kv.keys, kv.values))
            state = fold(state, k, v, delta=self.rule == "delta")
        return state

    def _remembered(self, kv: LayerKV, begin: int) -> tuple[int, State | None]:
        """Return how many tokens a memory that `kv` keeps has seen, at most `begin`, and the memory."""
        memory = kv.memory
        # Another's, or of later tokens: where that can be, all keys are still held.
        if memory is None or memory.owner != self or memory.length > begin:
            return 0, None
        held = memory.latest()
        return memory.length, None if held is None else (held["M"], held["z"])

    def _remember(self, kv: LayerKV, stop: int, length: int, state: State | None) -> None:
        """Keep the memory of the tokens before `stop`, with each segment folded as soon as it is full."""
        memory, full = kv.memory, stop // self.segment * self.segment
        if memory is None or memory.owner != self or memory.length >= full:
            return
        # Not when the next token comes: by then the segment's last page may be held in a smaller format.
        state = self._fold(state, kv, length, full, memory.dtype)
        assert state is not None, "a full segment leaves something"
        memory.update(full, {"M": state[0], "z": state[1]})

    def memory(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """See `Mechanism.memory`."""
        return {
            "M": (1, shape.kv_heads, shape.head_dim, shape.value_dim),
            "z": (1, shape.kv_heads, shape.head_dim),
        }

    def dropped(self, length: int) -> tuple[int, int]:
        """See `Mechanism.dropped`."""
        return (0, length // self.segment * self.segment)

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`; the memory, of constant size, comes on top."""
        return replace(self, segment=keys)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; for a query at the end of its segment, which is the dearest. The memory is float32."""
        keys, (full, rest) = min(n, self.segment), divmod(n, self.segment)
        folded = (n - 1) // self.segment * self.segment
        pair = 2.0 * shape.head_dim * shape.value_dim
        reads, numbers = shape.query_heads * pair, shape.kv_heads * shape.head_dim * (shape.value_dim + 1)
        folds = shape.kv_heads * pair * (2 if self.rule == "delta" else 1)
        kept = 4.0 * numbers if folded else 0.0
        local = (full * self.segment * (self.segment + 1) + rest * (rest + 1)) / 2
        return Cost(
            decode_flops=shape.read_flops(keys) + (reads if folded else 0.0),
            decode_bytes=keys * shape.token_bytes + kept,
            prefill_flops=shape.read_flops(local) + max(0, n - self.segment) * reads + folded * folds,
            kept_bytes=keys * shape.token_bytes + kept,
            decode_keys=keys,
        )


def sigma(x: Tensor) -> Tensor:
    """Return ELU(x) + 1: `x + 1` above 0 and `exp(x)` below, without the rounding of a sum near 0."""
    return torch.relu(x) + x.clamp(max=0).exp()


def read(q: Tensor, state: State) -> Tensor:
    """Return `sigma(q) M / (sigma(q) z)` (equation 3).

    Args:
        q: `[B, Hq, T, D]`; query head h reads the memory of KV head `h // (Hq // Hkv)`.
        state: the memory.

    Returns:
        `[B, Hq, T, Dv]`.
    """
    matrix, total = state
    batch, heads, count, dim = q.shape
    asked = sigma(q).reshape(batch, matrix.shape[1], -1, dim)
    weight = asked @ total.unsqueeze(-1)
    out: Tensor = (asked @ matrix) / weight.masked_fill(weight == 0, 1.0)
    return out.view(batch, heads, count, -1)


def fold(state: State | None, k: Tensor, v: Tensor, *, delta: bool) -> State:
    """Return the memory with one more segment in it (equations 4 and 5).

    Args:
        state: the memory before; None: empty.
        k: keys without positions, `[B, Hkv, S, D]`.
        v: values `[B, Hkv, S, Dv]`.
        delta: whether what the memory says of these keys already is left out.
    """
    written = sigma(k)
    if state is None:
        return written.mT @ v, written.sum(2)
    if delta:
        v = v - read(k, state)
    return state[0] + written.mT @ v, state[1] + written.sum(2)
