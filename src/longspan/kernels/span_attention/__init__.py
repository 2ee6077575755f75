"""Attention of many rows, each to a span of keys of its own (`reference.py`), and its gradients (`backward.py`)."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from longspan.kernels.span_attention import backward, reference

__all__ = ["serves", "span_attention", "span_attention_backward", "span_products"]

_TRITON = importlib.util.find_spec("triton") is not None


def serves(q: Tensor) -> bool:
    """Return whether a version faster than the reference serves these rows `[B, H, R, D]` (device, head size)."""
    return _TRITON and q.is_cuda and 16 <= q.shape[-1] <= 256


def span_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from every row to its span with the fastest version that serves; see `reference.span_attention`."""
    if serves(q) and not q.requires_grad:
        from longspan.kernels.span_attention import triton_kernels

        return triton_kernels.span_attention(q, k, v, lo, hi, scale=scale)
    return reference.span_attention(q, k, v, lo, hi, scale=scale)


def span_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lse: Tensor, delta: Tensor, do: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by the fastest version that serves; see `backward.span_attention_backward`."""
    if serves(q):
        from longspan.kernels.span_attention import triton_backward

        return triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=scale)
    return backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=scale)


def span_products(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lse: Tensor, do: Tensor, *, scale: float
) -> Tensor:
    """Return what outputs have in common with do by the fastest version that serves; see `backward.span_products`."""
    if serves(q):
        from longspan.kernels.span_attention import triton_backward

        return triton_backward.span_products(q, k, v, lo, hi, lse, do, scale=scale)
    return backward.span_products(q, k, v, lo, hi, lse, do, scale=scale)
