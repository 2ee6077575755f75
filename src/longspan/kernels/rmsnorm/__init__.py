"""RMSNorm, with the residual's sum in the same pass; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.rmsnorm import reference
from longspan.kernels.serving import triton_serves

__all__ = ["rmsnorm"]


def rmsnorm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add and normalise with the fastest version that serves; see `reference.rmsnorm`."""
    if triton_serves(x, weight, residual):
        from longspan.kernels.rmsnorm import triton_kernels

        return triton_kernels.rmsnorm(x, weight, eps, residual)
    return reference.rmsnorm(x, weight, eps, residual)
