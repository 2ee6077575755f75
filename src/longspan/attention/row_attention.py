"""Attention from the newest rows that are held to all of them, and at which positions they are read.

Up to the trained length a row is read at its token's position in the context. Beyond it rows are read as if they
followed one another from position 0 on. This file does not know which tokens the rows are, nor who chose them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longspan.kernels.partial_attention import merge_partials, partial_attention
from longspan.kv.rows import KeptRows


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int = 256) -> tuple[Tensor, Tensor]:
    """Attend causally from the last T rows to all rows.

    Args:
        q: `[1, Hq, T, D]`, rotated to where they read.
        k: `[1, Hkv, N, D]`, rotated to where they are read; the last T are those of the queries.
        v: `[1, Hkv, N, Dv]`.
        scale: what scores are multiplied by.
        tile: queries that are read together.

    Returns:
        `(out [1, Hq, T, Dv], lse [1, Hq, T])`.
    """
    count, before = q.shape[2], k.shape[2] - q.shape[2]
    if count == 1:
        return partial_attention(q, k, v, scale=scale)
    parts = []
    for start in range(0, count, tile):
        stop = min(start + tile, count)
        here = slice(before + start, before + stop)
        triangle = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        part = partial_attention(q[:, :, start:stop], k[:, :, here], v[:, :, here], triangle, scale=scale)
        if before + start:
            past = partial_attention(
                q[:, :, start:stop], k[:, :, : before + start], v[:, :, : before + start], scale=scale
            )
            part = merge_partials(torch.stack([past[0], part[0]]), torch.stack([past[1], part[1]]))
        parts.append(part)
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def own_count(rows: KeptRows, token: int, count: int) -> int:
    """Return how many of the queries from `token` on read keys at their own positions: the first so many."""
    trained = None if rows.rotary is None else rows.rotary.trained_length
    # Before anything was evicted, a row's place is its position.
    return count if trained is None or not rows.evicted else min(max(0, trained - token), count)


def sides(rows: KeptRows, token: int, count: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the stretches of `count` queries from `token` on that read at own positions, and those that do not."""
    own = own_count(rows, token, count)
    if own:
        yield 0, own, True
    if own < count:
        yield own, count, False
