"""Rows of queries sorted by where their spans begin, so that neighbours read nearly the same keys.

Every span of a KV head's queries makes a list of its own. Nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpanOrder:
    """The rows `G * T` of every KV head (all together H), sorted by where each of their S spans begins.

    Attributes:
        rows: int32 `[H * S, G * T]`, which row it is.
        lo: int32, as many, first key of its span; N: it has none.
        hi: int32, as many, last key; -1: it has none.
    """

    rows: Tensor
    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, lo: Tensor, hi: Tensor, kv_heads: int, keys: int) -> SpanOrder:
        """Sort spans `[B, Hq, T, S]` of a context of `keys` tokens."""
        lo, hi = _by_list(lo, kv_heads), _by_list(hi, kv_heads)
        lists, queries = lo.shape
        # One sort of all lists; radix sort takes as long as its numbers are wide.
        kind = torch.int32 if max(lists * (keys + 1), lists * queries) < 2**31 else torch.int64
        number = torch.arange(lists, device=lo.device, dtype=kind).unsqueeze(1)
        where = torch.where(lo <= hi, lo.clamp(min=0), keys).to(kind) + number * (keys + 1)
        where, rows = torch.sort(where.flatten())
        begins = (where.view(lists, queries) - number * (keys + 1)).int()
        rows = rows.view(lists, queries) - number * queries
        ends = torch.where(begins < keys, hi.gather(1, rows), -1).int()
        return cls(rows.int(), begins, ends)

    def sorted(self, x: Tensor, kv_heads: int, factor: float = 1.0, nothing: float = 0.0) -> Tensor:
        """Return numbers `[B, Hq, T, S]` in the rows' order, times `factor`; `nothing` where there is no span."""
        ordered = _by_list(x, kv_heads).float().gather(1, self.rows.long()) * factor
        return ordered.masked_fill_(self.hi < 0, nothing)

    def stretches(self, keys: int, block: int) -> tuple[Tensor, Tensor]:
        """Return which rows (`first .. last - 1`, int32 `[H * S, blocks]`) of each list may read each block of keys."""
        longest = torch.where(self.hi < 0, 0, self.hi - self.lo + 1).amax(1, keepdim=True)
        begin = torch.arange(0, keys, block, device=self.lo.device, dtype=torch.int32).expand(self.lo.shape[0], -1)
        first = torch.searchsorted(self.lo, begin - longest + 1, out_int32=True)
        last = torch.searchsorted(self.lo, (begin + block).clamp(max=keys), out_int32=True)
        return first, last


def _by_list(x: Tensor, kv_heads: int) -> Tensor:
    """Return x `[B, Hq, T, S]` as one list `G * T` of each KV head and span, `[B * Hkv * S, G * T]`."""
    batch, heads, count, spans = x.shape
    return x.reshape(batch * kv_heads, heads // kv_heads * count, spans).mT.reshape(-1, heads // kv_heads * count)
