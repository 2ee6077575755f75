"""A weight matrix times a few rows (`reference.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.gemv import reference
from longspan.kernels.serving import triton_serves

__all__ = ["gemv"]

_FEW = 8
"""Rows up to which reading the weights takes longer than multiplying them without tensor cores."""


def gemv(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply with the fastest version that serves; see `reference.gemv`."""
    if x.shape[0] <= _FEW and triton_serves(x, weight, residual):
        from longspan.kernels.gemv import triton_kernels

        return triton_kernels.gemv(x, weight, residual=residual, out_dtype=out_dtype)
    if out_dtype in (None, x.dtype) and weight.dtype == x.dtype:
        out = torch.nn.functional.linear(x, weight)
        return out if residual is None else out + residual
    return reference.gemv(x, weight, residual=residual, out_dtype=out_dtype)
