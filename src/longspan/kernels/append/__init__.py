"""What a layer does with one new token's rows before it attends; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.append import reference
from longspan.kernels.append.reference import Place, turned
from longspan.kernels.serving import triton_serves

__all__ = ["Place", "append", "turned"]


def append(
    rows: Tensor,
    place: Place,
    lengths: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Keep one token of every sequence with the fastest version that serves; see `reference.append`."""
    given = {"q_weight": q_weight, "k_weight": k_weight}
    if triton_serves(rows, place.keys, place.values) and (q_weight is None) == (k_weight is None):
        from longspan.kernels.append import triton_kernels

        return triton_kernels.append(rows, place, lengths, **given, eps=eps)
    return reference.append(rows, place, lengths, **given, eps=eps)
