"""XAttention: a cheaper prefill that reads, for every block of queries, the blocks of keys that hold most of the mass.

XAttention: Block Sparse Attention with Antidiagonal Scoring (arXiv 2503.16428, algorithm 1). Queries and keys fall into
blocks of 128 at absolute positions, and within them into groups of `stride`, S. A group of queries I and one of keys J
score the mean over their antidiagonal, `sum_s q[I S + S - 1 - s] . k[J S + s] / S`, so that every query and every key
takes part, at `1 / (2 S)` of dense attention's FLOPs. For each query head and block of queries, the softmax of these
scores over all earlier groups of keys gives every earlier block its share; the fewest blocks whose shares reach
`threshold` together are read exactly, with the first block of the context (sinks) and the queries' own block.
Everything is read at true positions.

Two things differ from the paper. The shares are of the keys before the block of queries, without that block's own, so
that no key of a query's future takes part in its choice (docs/mechanisms/xattention.md says what that costs). And there
is no search for a threshold of each head.

The queries of a block choose together: a choice hangs on queries up to 127 tokens after the one that reads by it. A
block of queries that is not there as a whole (decode, the end of a prompt, a chunk that begins or ends within a block)
attends densely. Chunks that begin and end where blocks do thus give what prefill at once gives; any other chunk reads
the blocks that it cuts densely. The keys of all earlier blocks are read by the scores; the values of blocks that were
not chosen are never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least
from longspan.attention.dense import Dense
from longspan.errors import UsageError
from longspan.kernels.block_attention import block_attention
from longspan.kv.base import LayerKV

_PIECE = 1 << 24
"""Numbers of working memory that scores may take (64 MiB in float32)."""

DENSITY = ((0.6, 0.13), (0.8, 0.21), (0.9, 0.30), (0.95, 0.40), (0.98, 0.51))
"""Share of a causal prefill's (query, key) pairs that is read at each threshold, with stride 16: SmolLM2-135M, 8K of
technical prose, mean of all layers and heads (docs/mechanisms/xattention.md). At 4K and 2K it was greater."""


@dataclass(frozen=True)
class XAttention(Mechanism):
    """Reads the blocks of keys that hold most of a block of queries' attention; decodes densely."""

    threshold: float = 0.9
    """Share of the mass before a block of queries that the blocks read must hold; 1: all of them."""
    stride: int = 16
    """Queries, and keys, that are scored together; it divides the block."""
    dense_layers: int = 0
    """First layers that read everything."""

    name: ClassVar[str] = "xattention"
    about: ClassVar[str] = "prefill by the blocks that hold most of the mass; decode is dense"
    source: ClassVar[str] = "arXiv 2503.16428"
    decode_order: ClassVar[str] = "n"
    beyond_window: ClassVar[bool] = False
    prefill_only: ClassVar[bool] = True
    block: ClassVar[int] = 128
    tile: ClassVar[int] = 512
    gpu_tile: ClassVar[int] = 2048

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        if not 0 < self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold} must lie above 0 and be at most 1")
        at_least("stride", self.stride, 1)
        if self.block % self.stride:
            raise UsageError(f"stride={self.stride} must divide the block of {self.block}: use 4, 8, 16 or 32")
        at_least("dense_layers", self.dense_layers, 0)

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        stop = first + q.shape[2]
        begin, end = -(-first // self.block) * self.block, stop // self.block * self.block
        if hints.layer < self.dense_layers or end <= begin:
            return _densely(q, kv, first, scale, hints)
        parts = [self._attend_blocks(q[:, :, begin - first : end - first], kv, begin, scale)]
        if first < begin:
            parts.insert(0, _densely(q[:, :, : begin - first], kv, first, scale, hints))
        if end < stop:
            parts.append(_densely(q[:, :, end - first :], kv, end, scale, hints))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def choose(self, q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
        """Choose blocks of keys for whole blocks of queries.

        Args:
            q: rotated queries `[B, Hq, T, D]` from `first` on; both multiples of the block.
            k: rotated keys `[B, Hkv, N, D]` of the blocks before the last block of queries.
            first: position of the first query.
            scale: what scores are multiplied by.

        Returns:
            bool `[B, Hq, T / block, N / block]`; True only for blocks before the queries' own.
        """
        logs = self._block_scores(q, k, scale).unflatten(2, (q.shape[2] // self.block, -1))  # [B, Hq, I, T / S, P]
        own = first // self.block + torch.arange(logs.shape[2], device=q.device)
        before = torch.arange(logs.shape[-1], device=q.device) < own.unsqueeze(1)  # [I, P]
        if self.threshold == 1:
            # Shares that round to nothing would end the sum too early.
            return before.expand(*logs.shape[:3], -1)
        shares = torch.softmax(logs.masked_fill(~before.unsqueeze(1), float("-inf")), -1).mean(3)
        shares = shares.masked_fill(~before, 0.0)
        ranks = shares.clone()
        ranks[..., 0] = 2.0  # sinks are read before all others
        order = ranks.argsort(dim=-1, descending=True, stable=True)
        sorted_shares = shares.gather(-1, order)
        reached = sorted_shares.cumsum(-1) - sorted_shares
        # Written so that a share that is not a number keeps its block: what is broken must show.
        kept = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, order, ~(reached >= self.threshold))
        return kept & before

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; for a layer that is not dense, and the share of pairs that `density` gives."""
        pairs = n * (n + 1) / 2
        search = 2.0 * shape.query_heads * shape.head_dim / self.stride
        dense = Dense().cost(n, shape)
        return replace(dense, prefill_flops=pairs * (density(self.threshold) * shape.read_flops(1) + search))

    def _block_scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Return, for each group of queries, the log of every block's weight: `[B, Hq, T / stride, N / block]`."""
        batch, heads, _, _ = q.shape
        q = q.unflatten(2, (-1, self.stride)).flip(3).flatten(3)  # [B, Hq, T / S, S * D]
        k = k.unflatten(2, (-1, self.stride)).flatten(3)
        groups, in_block = q.shape[2], self.block // self.stride
        q = (q * (scale / self.stride)).reshape(batch, k.shape[1], -1, q.shape[3])
        blocks = max(1, _PIECE // (batch * heads * groups * in_block))
        parts = []
        for piece in k.split(blocks * in_block, 2):
            scores = q @ piece.to(q.dtype).transpose(-1, -2)
            parts.append(torch.logsumexp(scores.unflatten(-1, (-1, in_block)), -1))
        return torch.cat(parts, -1).view(batch, heads, groups, -1)

    def _attend_blocks(self, q: Tensor, kv: LayerKV, first: int, scale: float) -> Tensor:
        """Attend from whole blocks of queries `[B, Hq, T, D]` at `first ..`, a multiple of the block."""
        stop = first + q.shape[2]
        q = kv.queries_from(q, first)
        k, v = kv.keys_at_own_positions(0, stop), kv.values(0, stop)
        past = stop - self.block
        chosen = self.choose(q, k[:, :, :past], first, scale) if past else q.new_empty(*q.shape[:2], 1, 0).bool()
        return block_attention(q, k, v, chosen, scale=scale)


def _densely(q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
    """Attend to every key, in dense attention's own tiles: larger ones would take too much memory."""
    dense, parts = Dense(), []
    for part in q.split(dense.gpu_tile if q.is_cuda else dense.tile, 2):
        parts.append(dense.attend_tile(part, kv, first, scale, hints))
        first += part.shape[2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def density(threshold: float) -> float:
    """Return the share of (query, key) pairs read at a threshold, between the measured points of `DENSITY`."""
    points = [(0.0, 0.0), *DENSITY, (1.0, 1.0)]
    low, high = next((a, b) for a, b in pairwise(points) if threshold <= b[0])
    return low[1] + (high[1] - low[1]) * (threshold - low[0]) / (high[0] - low[0])
