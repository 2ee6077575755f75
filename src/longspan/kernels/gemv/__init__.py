"""A weight matrix times a few rows (`reference.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.gemv import reference
from longspan.kernels.serving import triton_serves

__all__ = ["gemv"]

_FEW, _SMALL = 2, 1024
"""Rows up to which the kernel is faster than cuBLAS (H200), and outputs up to which it is with `_MOST` rows."""
_MOST = 8


def gemv(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply with the fastest version that serves; see `reference.gemv`."""
    few = x.shape[0] <= (_FEW if weight.shape[0] > _SMALL else _MOST)
    if few and triton_serves(x, weight, residual):
        from longspan.kernels.gemv import triton_kernels

        return triton_kernels.gemv(x, weight, residual=residual, out_dtype=out_dtype)
    kind = out_dtype or x.dtype
    if weight.dtype == x.dtype == kind:
        return x @ weight.T if residual is None else torch.addmm(residual.to(kind), x, weight.T)
    if x.is_cuda and weight.dtype == x.dtype and x.element_size() == 2 and kind == torch.float32:
        out = torch.mm(x, weight.T, out_dtype=kind)
        return out if residual is None else out + residual
    return reference.gemv(x, weight, residual=residual, out_dtype=out_dtype)
