"""Dense attention: every key, exactly.

`out_t = softmax(q_t K_{0..t} / sqrt(D)) V_{0..t}` (Attention Is All You Need, arXiv 1706.03762, equation 1).

Beyond the length that the model was trained on, positions are read as they are: the result is exact attention at
positions the model has never seen, which most models don't survive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape
from longspan.attention.sharded import Parts, attend_newest
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.kernels import causal_attention as causal
from longspan.kernels import dense_decode
from longspan.kernels.held import Held
from longspan.kernels.partial_attention import partial_attention
from longspan.kernels.superlinear import Turn
from longspan.kv.base import LayerKV


@dataclass(frozen=True)
class Dense(Mechanism):
    """Reads every key exactly."""

    name: ClassVar[str] = "dense"
    about: ClassVar[str] = "every key, exactly"
    source: ClassVar[str] = "arXiv 1706.03762"
    exact: ClassVar[bool] = True
    reads_all: ClassVar[bool] = True
    decode_order: ClassVar[str] = "n"
    sharded: ClassVar[bool] = True
    beyond_window: ClassVar[bool] = False

    def attend(self, q: Tensor, kv: LayerKV, *, scale: float | None = None, hints: Hints | None = None) -> Tensor:
        """See `Mechanism.attend`; a long chunk on a GPU is neither cut into tiles nor widened."""
        count, stop = q.shape[2], kv.length
        if q.is_cuda and count >= self.gpu_tile and kv.readable() is None:
            k, v, rotated = kv.keys_at_own_positions(0, stop), kv.values(0, stop), kv.queries_from(q, stop - count)
            if causal.cuda.serves(rotated, k, v):
                scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
                return causal.cuda.causal_attention(rotated, k, v, scale=scale)
        return super().attend(q, kv, scale=scale, hints=hints)

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        count = q.shape[2]
        stop = first + count
        q = kv.queries_from(q, first)
        k = kv.keys_at_own_positions(0, stop)
        v = kv.values(0, stop)
        if count == 1:
            return partial_attention(q, k, v, scale=scale)[0]
        return causal.causal_attention(q, k, v, scale=scale)

    def attend_shard(self, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints) -> Parts:
        """See `Mechanism.attend_shard`."""
        return Parts.one(*attend_newest(q, rows, first, None, scale))

    @property
    def steps(self) -> bool:
        """See `Mechanism.steps`."""
        return True

    def step(
        self, q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, searched: Held, turn: Turn | None
    ) -> Tensor:
        """See `Mechanism.step`."""
        return dense_decode.decode(q, k, v, lengths, scale=scale, per_token=None if turn is None else turn.per_token)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`."""
        return Cost(
            decode_flops=shape.read_flops(n),
            decode_bytes=n * shape.token_bytes,
            prefill_flops=n * shape.read_flops((n + 1) / 2),
            kept_bytes=n * shape.token_bytes,
            decode_keys=n,
        )
