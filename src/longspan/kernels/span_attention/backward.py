"""Gradients of span attention in plain PyTorch: the truth for faster versions.

A query has several spans, and may have attended to more than these. Whatever merged them, each span's part of the
gradients has one form (FlashAttention-2, arXiv 2307.08691, algorithm 2): with a log-sum-exp L and a number delta for
every query and span, and the gradient do of the query's output,

    P = exp(scale q k - L),  dS = P (do . v - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T do.

One softmax over everything: L is its log-sum-exp, and delta is `do . out`. Spans weighed from outside: L is less the
logarithm of the weight, see `attention/superlinear_gradients.py`. Masks over all keys say what is read: quadratic, for
tests. Inputs must be finite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def span_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lse: Tensor, delta: Tensor, do: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that come through the spans.

    Args:
        q: queries `[B, Hq, T, D]`, any float type; computed in float32 (float64 stays float64).
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        lo: integers `[B, Hq, T, S]`, first key of each span.
        hi: integers `[B, Hq, T, S]`, last key of it, at most N - 1; lo > hi: nothing is read.
        lse: `[B, Hq, T, S]`, what weights are relative to; inf: the span weighs nothing.
        delta: `[B, Hq, T, S]`, what is taken off `do . v`.
        do: `[B, Hq, T, Dv]`, gradient of the output.
        scale: what scores are multiplied by.

    Returns:
        `(dq [B, Hq, T, D], dk [B, Hkv, N, D], dv [B, Hkv, N, Dv])` in the computing type.
    """
    q, k, v, do = _computed(q, k, v, do)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(lo.shape[-1]):
        weights = _weights(q, k, lo[..., j], hi[..., j], lse[..., j], scale)
        d_scores = weights * (_per_key(do, v) - _grouped(delta[..., j].to(q.dtype), k).unsqueeze(-1)) * scale
        dq += (d_scores @ k.unsqueeze(2)).flatten(1, 2)
        dk += (d_scores.mT @ _grouped(q, k)).sum(2)
        dv += (weights.mT @ _grouped(do, k)).sum(2)
    return dq, dk, dv


def span_products(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, lse: Tensor, do: Tensor, *, scale: float
) -> Tensor:
    """Return `do . out` for the output of each span alone.

    Args:
        q: as in `span_attention_backward`.
        k: as there.
        v: as there.
        lo: as there.
        hi: as there.
        lse: `[B, Hq, T, S]`, each span's own log-sum-exp (-inf: it is empty).
        do: as there.
        scale: as there.

    Returns:
        `[B, Hq, T, S]` in the computing type; 0 for an empty span.
    """
    q, k, v, do = _computed(q, k, v, do)
    each = [
        (_weights(q, k, lo[..., j], hi[..., j], lse[..., j], scale) * _per_key(do, v)).sum(-1).flatten(1, 2)
        for j in range(lo.shape[-1])
    ]
    return torch.stack(each, -1)


def row_products(do: Tensor, out: Tensor) -> Tensor:
    """Return `do . out` of each row `[..., Dv]` of `out`, in float32 (float64 where do is).

    `do` has the same shape, or one axis less where neighbouring rows of `out` `[..., S, Dv]` share one.
    """
    do, out = _computed(do, out)
    return ((do if do.dim() == out.dim() else do.unsqueeze(-2)) * out).sum(-1)


def _computed(q: Tensor, *others: Tensor) -> list[Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [x.to(dtype) for x in (q, *others)]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """Return x `[B, Hq, ...]` as `[B, Hkv, G, ...]`."""
    grouped: Tensor = x.unflatten(1, (k.shape[1], x.shape[1] // k.shape[1]))
    return grouped


def _per_key(do: Tensor, v: Tensor) -> Tensor:
    """Return `do . v`, `[B, Hkv, G, T, N]`."""
    return _grouped(do, v) @ v.mT.unsqueeze(2)


def _weights(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return `exp(scale q k - lse)`, 0 where a key is not read, `[B, Hkv, G, T, N]`."""
    at = torch.arange(k.shape[2], device=q.device)
    lo, hi, lse = (_grouped(x, k).unsqueeze(-1) for x in (lo, hi, lse.to(q.dtype)))
    read = (at >= lo) & (at <= hi)
    return torch.exp(((_grouped(q, k) @ k.mT.unsqueeze(2)) * scale - lse).masked_fill(~read, float("-inf")))
