"""Attention of many rows, each to a span of keys of its own (`reference.py`), and its gradients (`backward.py`)."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longspan.kernels.span_attention import backward, reference
from longspan.kernels.span_attention.order import SpanOrder

__all__ = ["row_products", "serves", "span_attention", "span_attention_backward", "span_products"]

_TRITON = importlib.util.find_spec("triton") is not None


def serves(q: Tensor) -> bool:
    """Return whether a version faster than the reference serves these rows `[B, H, R, D]` (device, type, head size)."""
    return _TRITON and q.is_cuda and q.dtype != torch.float64 and 16 <= q.shape[-1] <= 256


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    scale: float,
    order: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every row to its span with the fastest version that serves; see `reference.span_attention`.

    `order` saves that version the sorting of rows, where it is known already (`launch.span_attention`).
    """
    if serves(q) and not q.requires_grad:
        from longspan.kernels.span_attention import launch

        kind = out_dtype or torch.float32
        return launch.span_attention(q, k, v, lo, hi, scale=scale, order=order, out_dtype=kind)
    return reference.span_attention(q, k, v, lo, hi, scale=scale, out_dtype=out_dtype)


def span_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    *,
    scale: float,
    order: SpanOrder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by the fastest version that serves; see `backward.span_attention_backward`.

    `order` saves that version the sorting of spans, where it is known already.
    """
    if serves(q):
        from longspan.kernels.span_attention import triton_backward

        return triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=scale, order=order)
    return backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=scale)


def span_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    lse: Tensor,
    do: Tensor,
    *,
    scale: float,
    order: SpanOrder | None = None,
) -> Tensor:
    """Return `do . out` of each span by the fastest version that serves; see `backward.span_products` and above."""
    if serves(q):
        from longspan.kernels.span_attention import triton_backward

        return triton_backward.span_products(q, k, v, lo, hi, lse, do, scale=scale, order=order)
    return backward.span_products(q, k, v, lo, hi, lse, do, scale=scale)


def row_products(do: Tensor, out: Tensor) -> Tensor:
    """Return `do . out` of each row by the fastest version that serves; see `backward.row_products`."""
    if serves(out):
        from longspan.kernels.span_attention import triton_backward

        return triton_backward.row_products(do, out)
    return backward.row_products(do, out)
