"""RocketKV: evict some keys for good, and in decode read the best of the others.

RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression (arXiv 2502.14051, section 3, and
NVIDIA's code for constants). Where n tokens shall be read at the price of `budget` keys, `c = n / budget`:

1. SnapKV with wide pooling (`kernel=63`) keeps `n / c^a` keys, `a = min(0.2 + 0.06 log2 c, 0.8)`.
2. A query of decode reads the best of them. What is left to save is `c2 = kept / budget`, half of it by chunks of
   `p = min(floor(c2), ceil(sqrt(c2)))` rows, the rest by channels, `r = D p / c2` of them: for a KV head those with the
   greatest `sum over its query heads of |q_d|`. A chunk scores `sum over these channels of q_d b_d`, where `b_d` is the
   chunk's greatest key where the queries' sum is positive and its least where not; scores are multiplied by
   `sqrt(|q| / |q over these channels|)` (sums of magnitudes, as in SparQ), become shares by a softmax a query head, and
   add up over query heads. The `budget / 2` best rows are read exactly: scoring took as many bytes as the other half.

What differs: where no more than `budget` rows are held all are read; several queries at once (a question) read all that
is held, as in NVIDIA's code; of equal chunks the older is read. Kept keys grow as the context does, slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Shape
from longspan.attention.snapkv import SnapKV
from longspan.kernels.partial_attention import partial_attention
from longspan.kv.rows import KeptRows


@dataclass(frozen=True)
class RocketKV(SnapKV):
    """Evicts as SnapKV, and reads the best rows of what is left."""

    kernel: int = 63
    """Neighbouring rows that a row's score is the highest of; odd."""

    name: ClassVar[str] = "rocketkv"
    about: ClassVar[str] = "SnapKV's keys, of which decode reads those with the best approximate scores"
    source: ClassVar[str] = "arXiv 2502.14051"
    bounded_memory: ClassVar[bool] = False
    reads_all: ClassVar[bool] = False
    decode_order: ClassVar[str] = "1"

    def keeps(self, n: int) -> int:
        """See `Evicting.keeps`: `n / c^a`."""
        c = max(1.0, n / self.budget)
        return max(self.budget, int(n / c ** min(0.2 + 0.06 * math.log2(c), 0.8)))

    def decode(self, q: Tensor, k: Tensor, v: Tensor, rows: KeptRows, own: bool, scale: float) -> Tensor:
        """See `Evicting.decode`."""
        if k.shape[2] > self.budget:
            index = self._best(q, k, rows, own, scale)
            k, v = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        return partial_attention(q, k, v, scale=scale)[0]

    def _best(self, q: Tensor, k: Tensor, rows: KeptRows, own: bool, scale: float) -> Tensor:
        """Return the rows `[1, Hkv, budget / 2, 1]` whose approximate scores for one query `[1, Hq, 1, D]` are best."""
        kv_heads, held, dim = k.shape[1:]
        size, channels = self.approximation(rows.committed, dim)
        grouped = q.view(kv_heads, -1, dim)
        magnitude = grouped.abs()
        # Of equal channels the first: a stable sort, so that the choice is the same everywhere.
        used = magnitude.sum(1).sort(dim=-1, descending=True, stable=True).indices[:, :channels].unsqueeze(1)
        part = grouped.gather(2, used.expand(-1, grouped.shape[1], -1))
        rising = part.sum(1, keepdim=True) > 0
        bounds = []
        for lowest, highest in rows.bounds(k[0], size, own):
            at = used.expand(-1, lowest.shape[1], -1)
            bounds.append(torch.where(rising, highest.gather(2, at), lowest.gather(2, at)))
        portion = part.abs().sum(-1, keepdim=True) / magnitude.sum(-1, keepdim=True)
        scores = (part @ torch.cat(bounds, 1).to(q.dtype).mT) * scale / portion.sqrt()
        shares = torch.softmax(scores.repeat_interleave(size, -1)[..., :held], -1, dtype=torch.float64).sum(1)
        best = shares.sort(dim=-1, descending=True, stable=True).indices[:, : max(1, self.budget // 2)]
        return best.view(1, kv_heads, -1, 1)

    def approximation(self, kept: int, dim: int) -> tuple[int, int]:
        """Return the rows in a chunk and the channels by which scores are approximated where so many rows are kept."""
        c = max(1.0, kept / self.budget)
        size = min(math.floor(c), math.ceil(math.sqrt(c)))
        return size, min(dim, max(1, round(dim * size / c)))

    def _as_dense(self, first: int, stop: int) -> bool:
        """A single query is decode, and reads the best rows."""
        return super()._as_dense(first, stop) and (stop - first > 1 or stop <= self.budget)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; scores are counted as the whole keys that take as many bytes."""
        cost, kept = super().cost(n, shape), min(n, self.keeps(n))
        if kept <= self.budget:
            return cost
        size, channels = self.approximation(kept, shape.head_dim)
        scored = kept / size * channels / shape.head_dim
        keys = self.budget // 2
        return replace(
            cost,
            decode_flops=shape.read_flops(keys) + 2.0 * shape.query_heads * scored * shape.head_dim,
            decode_bytes=keys * shape.token_bytes + scored * shape.kv_heads * shape.head_dim * shape.kv_bytes,
            decode_keys=keys + scored,
        )
