"""Rows of queries sorted by where their spans begin, so that neighbours read nearly the same keys.

Every span of a KV head's queries makes lists of its own, one for each band of neighbouring queries: these have spans of
nearly the same length, where lengths grow with the context. Nothing waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class SpanOrder:
    """Rows, numbered `g * T + t` within each KV head, in lists sorted by where spans begin.

    There are `H = B * Hkv * S * bands` lists, the bands of a span beside each other, each of `M = G * ceil(T / bands)`
    rows.

    Attributes:
        rows: int32 `[H, M]`, which row it is; `G * T`: none, where the bands are longer than the queries.
        lo: int32 `[H, M]`, first key of its span; N: it has none, and comes last.
        hi: int32 `[H, M]`, last key; -1: it has none.
        bands: see above.
        kv_heads: Hkv.
    """

    rows: Tensor
    lo: Tensor
    hi: Tensor
    bands: int
    kv_heads: int

    @classmethod
    def of(cls, lo: Tensor, hi: Tensor, kv_heads: int, keys: int, bands: int = 1) -> SpanOrder:
        """Sort spans `[B, Hq, T, S]` of a context of `keys` tokens."""
        batch, heads, count, spans = lo.shape
        bands = min(bands, count)
        row = torch.arange(heads // kv_heads * count, device=lo.device).view(1, -1, count, 1)
        row = row.expand(batch * kv_heads, -1, -1, spans)
        lo, hi, row = (
            _in_lists(x, kv_heads, bands, fill)
            for x, fill in ((lo, keys), (hi, -1), (row.reshape(lo.shape), row.shape[1] * count))
        )
        lists, length = lo.shape
        # One sort of all lists; radix sort takes as long as its numbers are wide.
        kind = torch.int32 if max(lists * (keys + 1), lists * length) < 2**31 else torch.int64
        number = torch.arange(lists, device=lo.device, dtype=kind).unsqueeze(1)
        where = torch.where(lo <= hi, lo.clamp(min=0), keys).to(kind) + number * (keys + 1)
        where, at = torch.sort(where.flatten())
        begins = (where.view(lists, length) - number * (keys + 1)).int()
        ends = torch.where(begins < keys, hi.flatten()[at].view(lists, length), -1).int()
        return cls(row.flatten()[at].view(lists, length).int(), begins, ends, bands, kv_heads)

    def sorted(self, x: Tensor) -> Tensor:
        """Return numbers `[B, Hq, T, S]` in the order of `rows`, float32; 0 where there is no row."""
        batch, heads, count, spans = x.shape
        each = x.float().reshape(batch * self.kv_heads, -1, spans).mT.reshape(-1, heads // self.kv_heads * count)
        at = self.rows.view(each.shape[0], -1).long()
        found = each.gather(1, at.clamp(max=each.shape[1] - 1)).masked_fill_(at == each.shape[1], 0.0)
        return found.view(self.rows.shape)

    def facts(self, lse: Tensor, delta: Tensor) -> Tensor:
        """Return what a kernel reads of each row beside the row itself, int32 `[H, M, 4]`.

        That is the first key, the number of keys less 1 (-1 and less: there is none), and the bits of two float32:
        `lse` (`[B, Hq, T, S]`) in base 2, infinite where there is no span, and `delta`.
        """
        lse = (self.sorted(lse) * LOG2_E).masked_fill_(self.hi < 0, float("inf"))
        bits = (x.view(torch.int32) for x in (lse, self.sorted(delta)))
        return torch.stack([self.lo, self.hi - self.lo, *bits], -1)

    def stretches(self, keys: int, block: int) -> tuple[Tensor, Tensor]:
        """Return which rows (`first .. last - 1`, int32 `[H, blocks]`) of each list may read each block of keys."""
        longest = torch.where(self.hi < 0, 0, self.hi - self.lo + 1).amax(1, keepdim=True)
        begin = torch.arange(0, keys, block, device=self.lo.device, dtype=torch.int32).expand(self.lo.shape[0], -1)
        first = torch.searchsorted(self.lo, begin - longest + 1, out_int32=True)
        last = torch.searchsorted(self.lo, (begin + block).clamp(max=keys), out_int32=True)
        return first, last


def bands(first: int, count: int, rows: int, longest: int, shortest: int) -> int:
    """Return into how many bands the queries are best cut.

    Within a tile of 128 rows, spans begin up to N / (tiles of a list) keys apart, and differ in length as the queries
    of a band do: more bands make the one wider, the other narrower.

    Args:
        first: position of the first query.
        count: queries.
        rows: of a query in a list, its heads of one KV head.
        longest: keys of the last query's spans.
        shortest: keys of the first one's.
    """
    apart = (first + count) / max(1.0, rows * count / 128)
    return max(1, min(16, round(math.sqrt((longest - shortest) / apart))))


def _in_lists(x: Tensor, kv_heads: int, bands: int, fill: int) -> Tensor:
    """Return x `[B, Hq, T, S]` as lists `[B * Hkv * S * bands, G * ceil(T / bands)]`, filled up."""
    batch, heads, count, spans = x.shape
    width = -(-count // bands)
    x = torch.nn.functional.pad(x, (0, 0, 0, bands * width - count), value=fill)
    x = x.reshape(batch * kv_heads, heads // kv_heads, bands, width, spans).permute(0, 4, 2, 1, 3)
    return x.reshape(batch * kv_heads * spans * bands, heads // kv_heads * width)
