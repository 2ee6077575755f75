"""StreamingLLM: the first tokens (sinks) and the newest ones, in bounded memory.

Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453): a query at t sees the keys `0 .. sinks-1`
and `t - window + 1 .. t`, with positions counted inside that cache (section 3.2), so the model never meets a distance
it was not trained on. What lies between is dropped, and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least
from longspan.attention.sharded import Parts, attend_newest
from longspan.attention.spans import attend_spans
from longspan.attention.window import attend_far, attend_window
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.kernels.partial_attention import merge_partials
from longspan.kv.base import LayerKV


@dataclass(frozen=True)
class Streaming(Mechanism):
    """Reads sinks and a window, and keeps nothing else."""

    window: int = 2044
    """Newest keys that a query sees, its own included."""
    sinks: int = 4
    """First keys of the context that every query sees."""

    name: ClassVar[str] = "streaming"
    about: ClassVar[str] = "sinks and the newest keys, bounded memory"
    source: ClassVar[str] = "arXiv 2309.17453"
    bounded_memory: ClassVar[bool] = True
    decode_order: ClassVar[str] = "1"
    sharded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)

    def reads_all_of(self, n: int) -> bool:
        """See `Mechanism.reads_all_of`."""
        return n <= self.window

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        near = attend_window(q, kv, first, self.window, scale)
        far = attend_far(q, kv, first, self.window, torch.arange(min(self.sinks, kv.length)), scale)
        if far is None:
            return near[0]
        return merge_partials(torch.stack([near[0], far[0]]), torch.stack([near[1], far[1]]))[0]

    def attend_shard(self, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints) -> Parts:
        """See `Mechanism.attend_shard`; sinks are one span, as if it stood directly before the window."""
        near = attend_newest(q, rows, first, self.window, scale)
        count = q.shape[2]
        if not self.sinks or first + count <= self.window:
            return Parts.one(*near)
        at = torch.arange(first, first + count, device=q.device).view(1, 1, -1, 1)
        last = (at - self.window).clamp(max=self.sinks - 1).expand(*q.shape[:2], -1, -1)
        seen_from = last + at.clamp(max=self.window - 1) + 1
        begin, end = rows.shards.ranges(torch.zeros_like(last), last)
        stop = rows.shards.count(min(self.sinks, first + count))
        out, lse = attend_spans(q, rows, first, begin, end, at - seen_from, scale, stop=stop)
        outs, lses = torch.stack([near[0], out[..., 0, :]]), torch.stack([near[1], lse[..., 0]])
        return Parts.one(*merge_partials(outs, lses))

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`."""
        return replace(self, window=keys - self.sinks)

    def dropped(self, length: int) -> tuple[int, int]:
        """See `Mechanism.dropped`."""
        return (min(self.sinks, length), max(min(self.sinks, length), length - self.window + 1))

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`."""
        keys = min(n, self.window + self.sinks)
        return Cost(
            decode_flops=shape.read_flops(keys),
            decode_bytes=keys * shape.token_bytes,
            prefill_flops=n * shape.read_flops(keys),
            kept_bytes=keys * shape.token_bytes,
            decode_keys=keys,
        )
