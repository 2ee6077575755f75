"""Search scores of chosen anchors, and their gradients; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.anchor_scores import reference
from longspan.kernels.span_attention import serves

__all__ = ["anchor_scores_backward"]


def anchor_scores_backward(q: Tensor, k: Tensor, anchors: Tensor, d_scores: Tensor, dk: Tensor) -> Tensor:
    """Add to dk, and return dq, with the fastest version that serves; see `reference.anchor_scores_backward`."""
    if serves(q):
        from longspan.kernels.anchor_scores import triton_kernels

        return triton_kernels.anchor_scores_backward(q, k, anchors, d_scores, dk)
    return reference.anchor_scores_backward(q, k, anchors, d_scores, dk)
