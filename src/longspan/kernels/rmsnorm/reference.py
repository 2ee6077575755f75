"""RMSNorm (arXiv 1910.07467) in plain PyTorch, after the residual's sum: the truth for faster versions.

A model's layer is `x + mixer(rmsnorm(x))`. Taken across two layers, the sum of one and the norm of the next read and
write the same numbers, so they are one operation. It does not know what a mixer is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `x + residual` normalised, and the sum itself.

    Args:
        x: `[..., C]`, any float type; computed in float32 (float64 stays float64).
        weight: `[C]`, what normalised channels are multiplied by, before rounding.
        eps: added to the mean of squares.
        residual: as x, of its own float type; None: nothing is added.

    Returns:
        `(normed [..., C] of x's type, sum [..., C] of the residual's)`. The sum is rounded to its type before it is
        normalised; without a residual it is x itself.
    """
    total = x if residual is None else (_wide(x) + _wide(residual)).to(residual.dtype)
    wide = _wide(total)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return normed.to(x.dtype), total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
