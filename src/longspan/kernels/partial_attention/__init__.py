"""Attention over a part of the keys with its log-sum-exp, and the merge of parts; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.partial_attention import cpu, cuda, reference
from longspan.kernels.partial_attention.reference import merge_partials

__all__ = ["merge_partials", "partial_attention"]


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q to one part of the keys with the fastest version that serves; see `reference.partial_attention`."""
    if cpu.serves(q, k, v):
        return cpu.partial_attention(q, k, v, mask, scale=scale)
    if cuda.serves(q, k, v):
        return cuda.partial_attention(q, k, v, mask, scale=scale)
    return reference.partial_attention(q, k, v, mask, scale=scale)
