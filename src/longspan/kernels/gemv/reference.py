"""A weight matrix times a few rows, in plain PyTorch: the truth for faster versions."""

from __future__ import annotations

import torch
from torch import Tensor


def gemv(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Return `x weight^T`, plus a residual.

    Args:
        x: `[S, K]`, any float type; computed in float32 (float64 stays float64).
        weight: `[M, K]`.
        residual: `[S, M]`, added.
        out_dtype: of the result; None: x's.

    Returns:
        `[S, M]`.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(kind) @ weight.to(kind).T
    return (out if residual is None else out + residual.to(kind)).to(out_dtype or x.dtype)
