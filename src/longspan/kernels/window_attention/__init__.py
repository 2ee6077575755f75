"""Causal attention to a sliding window, and its gradients; see `reference.py`."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longspan.kernels.window_attention import reference

__all__ = ["serves", "window_attention", "window_attention_backward"]

_TRITON = importlib.util.find_spec("triton") is not None


def serves(q: Tensor, v: Tensor) -> bool:
    """Return whether a version faster than the reference serves q `[B, Hq, T, D]` and v `[B, Hkv, N, Dv]`."""
    return _TRITON and q.is_cuda and q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= 256


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to the window with the fastest version that serves; see `reference.window_attention`."""
    if serves(q, v) and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        from longspan.kernels.window_attention import triton_kernels

        return triton_kernels.window_attention(q, k, v, window=window, scale=scale, out_dtype=out_dtype)
    return reference.window_attention(q, k, v, window=window, scale=scale, out_dtype=out_dtype)


def window_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, do: Tensor, *, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by the fastest version that serves; see `reference.window_attention_backward`.

    A window is a span of every query: the kernels of span attention serve.
    """
    if serves(q, v):
        from longspan.kernels.span_attention import triton_backward

        at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device).view(1, 1, -1, 1).expand(*lse.shape, 1)
        spans = ((at - window + 1).clamp(min=0), at, lse.unsqueeze(-1), delta.unsqueeze(-1))
        return triton_backward.span_attention_backward(q, k, v, *spans, do, scale=scale)
    return reference.window_attention_backward(q, k, v, lse, delta, do, window=window, scale=scale)
