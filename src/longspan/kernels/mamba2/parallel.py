"""Mamba-2's scan over all chunks at once, in operations that PyTorch differentiates: for training.

The equations are those of `reference.scan` (README.md), with three products where that has a loop: what a chunk's
tokens tell each other, what each chunk leaves, and what is left of earlier chunks, by one triangular matrix over chunks
(arXiv 2405.21060, section 6). Differences of running sums are those within one chunk, or of
chunks' totals in float64. A scan of `T` tokens holds `T * chunk` weights a head: `checkpoint` where that is too much.
It begins at an empty state and returns none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.mamba2.reference import time_steps


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk: int = 128,
) -> Tensor:
    """Read T tokens from an empty state.

    Args:
        x: `[B, T, H, P]`, any float type; products are computed in it, decays in float32 (float64 stays float64).
        dt: `[B, T, H]`, time steps before their bias and softplus.
        A: `[H]`, negative.
        B: `[B, T, G, N]`; head h reads group `h // (H // G)`.
        C: `[B, T, G, N]`.
        D: `[H]`, how much of x is added to its output; None: nothing.
        dt_bias: `[H]` or None.
        chunk: tokens of a chunk.

    Returns:
        `[B, T, H, P]` in x's type.
    """
    tokens, heads, groups = x.shape[1], x.shape[2], B.shape[2]
    rest = -tokens % chunk
    steps = time_steps(dt, dt_bias, (0.0, float("inf")))  # [B, T, H]
    steps = F.pad(steps, (0, 0, 0, rest)).unflatten(1, (-1, chunk)).movedim(3, 1)  # [B, H, C, L]
    values = F.pad(x, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, chunk)).movedim(3, 1)  # [B, H, C, L, P]
    keys, queries = (
        F.pad(z, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, chunk)).movedim(3, 1) for z in (B, C)
    )  # [B, G, C, L, N]
    since = (steps * A.to(steps.dtype).view(1, -1, 1, 1)).cumsum(-1)  # what is left at l of what the chunk began with
    scores = (queries @ keys.mT).repeat_interleave(heads // groups, 1)  # [B, H, C, L, L]
    weights = scores * (_decays(since) * steps.unsqueeze(-2)).to(x.dtype)
    y: Tensor = weights @ values
    keys, queries = (z.repeat_interleave(heads // groups, 1) for z in (keys, queries))
    kept = (steps * torch.exp(since[..., -1:] - since)).to(x.dtype)
    left = keys.mT @ (values * kept.unsqueeze(-1))  # [B, H, C, N, P], of each chunk alone
    totals = F.pad(since[..., -1].double(), (1, 0)).cumsum(-1)  # [B, H, C + 1]
    between = _decays(totals[..., 1:], before=totals[..., :-1])  # [B, H, C, C]: at c, of what chunk s left
    held = (between.to(x.dtype) @ left.flatten(-2)).view(left.shape)
    y = y + (queries @ held) * torch.exp(since).to(x.dtype).unsqueeze(-1)
    y = y.movedim(1, 3).flatten(1, 2)[:, :tokens]  # [B, T, H, P]
    return y if D is None else y + x * D.to(x.dtype).unsqueeze(-1)


def _decays(sums: Tensor, before: Tensor | None = None) -> Tensor:
    """Return `exp(sums[l] - sums[s])` at (l, s), s <= l, else 0; with `before`, `exp(before[l] - sums[s])`, s < l."""
    length = sums.shape[-1]
    at = torch.arange(length, device=sums.device)
    allowed = at.unsqueeze(1) >= at if before is None else at.unsqueeze(1) > at
    apart = (sums if before is None else before).unsqueeze(-1) - sums.unsqueeze(-2)
    return torch.exp(apart.masked_fill(~allowed, float("-inf")))
