"""Star attention (arXiv 2411.17116): a context is read by blocks that see an anchor and themselves, and asked whole.

Phase 1 reads the context, without a word between ranks. With blocks `c_1 .. c_n` and the anchor `a` (the first tokens
of `c_1`), the queries of block i > 1 attend causally to `[a, c_i]`, those of `c_1` to `c_1`. Every rank reads the
anchor itself, before its own blocks, and keeps none of its keys and values but the rank that holds `c_1`. Positions are
those of the text: the anchor's are 0 and on, a block's its own, as if what lies between were not there.

Phase 2 asks: with `A_h, s_h` what a question's queries give over rank h's keys and the sum of its exponentials, `A =
sum_h (s_h / sum s) A_h`, which is `context_parallel.spread_attention`. A question's own keys, and the answer's, lie on
one rank (`layout.held_by`).

Phase 1 is not dense attention, phase 2 is, over keys that phase 1 has made. Blocks may be smaller than a rank's share:
the paper takes one size for all lengths. It knows no models, and its phase 1 no groups.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.distributed.layout import Layout, contiguous
from longspan.distributed.merge import merge_into
from longspan.distributed.parts import attend_part, computed
from longspan.errors import UsageError


@dataclass(frozen=True)
class Star:
    """How a context of one length lies over ranks, and what each reads in phase 1."""

    length: int
    ranks: int
    anchor: int | None = None
    """Tokens of the anchor; None: a block's."""
    block: int | None = None
    """Tokens of a block; None: a rank's share."""

    def __post_init__(self) -> None:
        """Refuse an anchor or a block that can't be (UsageError)."""
        for name, value in (("block", self.block), ("anchor", self.anchor)):
            if value is not None and value < (1 if name == "block" else 0):
                raise UsageError(f"star's {name}={value} is too small: give a number of tokens")
        if self.anchor is not None and self.anchor > self.block_tokens:
            raise UsageError(
                f"star's anchor of {self.anchor:,} tokens is longer than its block of {self.block_tokens:,}: "
                "give a shorter anchor or longer blocks"
            )

    @property
    def block_tokens(self) -> int:
        """Tokens of a block; the last may have fewer."""
        return min(self.block or -(-self.length // self.ranks), self.length)

    @property
    def anchor_tokens(self) -> int:
        """Tokens of the anchor."""
        return self.block_tokens if self.anchor is None else self.anchor

    @property
    def layout(self) -> Layout:
        """Whole blocks, one after the other, nearly as many on every rank: what is kept after phase 1."""
        return contiguous(self.length, self.ranks, multiple=max(1, self.block_tokens))

    def prefix(self, rank: int) -> int:
        """Return how many tokens of the anchor a rank reads before its own; 0 where it holds them, or nothing."""
        own = self.layout.runs[rank]
        return self.anchor_tokens if own and own[0][0] > 0 else 0

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions of the tokens that a rank reads: the anchor's, then its own."""
        anchor = torch.arange(self.prefix(rank), device=device)
        return torch.cat([anchor, self.layout.positions(rank, device)])


def star_attention(star: Star, rank: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Attend as phase 1 does, to what this rank has.

    Args:
        star: how the context lies.
        rank: which one this is.
        q: `[B, Hq, T, D]` of the positions `star.positions(rank)`.
        k: `[B, Hkv, T, D]` of the same.
        v: `[B, Hkv, T, Dv]`.
        scale: what scores are multiplied by; None: `1/sqrt(D)`.

    Returns:
        `[B, Hq, T, Dv]` in q's type: those of the anchor first. Keys and values behind it are what the rank keeps.

    Raises:
        UsageError: tensors of another number of positions.
    """
    prefix = star.prefix(rank)
    wanted = prefix + star.layout.counts[rank]
    if not q.shape[2] == k.shape[2] == v.shape[2] == wanted:
        raise UsageError(f"rank {rank} reads {wanted} tokens, its anchor's included: give q, k and v of these")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=computed(q), device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    # The anchor and the first block after it are one causal block; every later one sees the anchor as a whole.
    edges = [0, *range(prefix + star.block_tokens, wanted, max(1, star.block_tokens)), wanted]
    anchor = slice(0, star.anchor_tokens)
    for start, stop in itertools.pairwise(edges):
        rows = slice(start, stop)
        if start and star.anchor_tokens:
            part = attend_part(q[:, :, rows], k[:, :, anchor], v[:, :, anchor], scale=scale, causal=False)
            merge_into(out[:, :, rows], lse[:, :, rows], *part)
        if stop > start:
            part = attend_part(q[:, :, rows], k[:, :, rows], v[:, :, rows], scale=scale, causal=True)
            merge_into(out[:, :, rows], lse[:, :, rows], *part)
    return out.to(q.dtype)
