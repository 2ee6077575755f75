"""A partial output merged in place into what has been summed up, and all ranks' merged at once; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.lse_merge import reference
from longspan.kernels.lse_merge.reference import merged
from longspan.kernels.serving import triton_serves

__all__ = ["merge_into", "merge_packed", "merged"]


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge with the fastest version that serves; see `reference.merge_into`."""
    if triton_serves(out, lse, part, part_lse) and out.stride(-1) == part.stride(-1) == 1:
        from longspan.kernels.lse_merge import triton_kernels

        triton_kernels.merge_into(out, lse, part, part_lse)
    else:
        reference.merge_into(out, lse, part, part_lse)


def merge_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Merge with the fastest version that serves; see `reference.merge_packed`."""
    if triton_serves(packed) and packed.is_contiguous():
        from longspan.kernels.lse_merge import triton_kernels

        return triton_kernels.merge_packed(packed)
    return reference.merge_packed(packed)
