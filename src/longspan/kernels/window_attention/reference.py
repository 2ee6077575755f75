"""Causal attention to a sliding window in plain PyTorch, and its gradients: the truth for faster versions.

Queries are the last T positions of the keys; the query at t reads the keys `t - window + 1 .. t`. A mask over all keys
says so: quadratic, for tests. Parts that share no key merge by their log-sum-exp, and so do their gradients: given the
merged log-sum-exp L, the upstream gradient do and `delta = do . out` of the merged output, each part's own are (as in
FlashAttention-2, arXiv 2307.08691, algorithm 2)

    P = exp(scale q k - L),  dS = P (do . v - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T do.

It does not know what else is attended to, nor positions and pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention import reference


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from every query to the newest `window` keys that it sees, its own included.

    Args:
        q: queries `[B, Hq, T, D]` of the positions `N - T .. N - 1`, any float type; computed in float32 (float64 stays
            float64).
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        window: keys that each query sees, at least 1.
        scale: what scores are multiplied by.
        out_dtype: the type of `out`; None: the computing type, for a merge with other parts.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`, lse in the computing type. What a query does not see never reaches its
        output, whatever it holds.
    """
    out, lse = reference.partial_attention(q, k, v, _seen(q, k, window), scale=scale)
    return (out if out_dtype is None else out.to(out_dtype)), lse


def window_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, do: Tensor, *, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the window's share of the gradients.

    Args:
        q: as in `window_attention`.
        k: as there.
        v: as there.
        lse: `[B, Hq, T]`, log-sum-exp of all that each query attends to, the window or more.
        delta: `[B, Hq, T]`, `do . out` of the output of all that.
        do: `[B, Hq, T, Dv]`, gradient of that output.
        window: as in `window_attention`.
        scale: as there.

    Returns:
        `(dq [B, Hq, T, D], dk [B, Hkv, N, D], dv [B, Hkv, N, Dv])` in the computing type.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (k.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    q, do = q.to(dtype).unflatten(1, shape[1:]), do.to(dtype).unflatten(1, shape[1:])  # [B, Hkv, G, T, D]
    lse, delta = lse.to(dtype).view(*shape, -1, 1), delta.to(dtype).view(*shape, -1, 1)
    k, v = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)  # [B, Hkv, 1, N, D]
    seen = _seen(q, k, window)
    weights = torch.exp((q @ k.mT * scale - lse).masked_fill(~seen, float("-inf")))
    d_scores = weights * (do @ v.mT - delta) * scale
    dq = (d_scores @ k).flatten(1, 2)
    return dq, (d_scores.mT @ q).sum(2), (weights.mT @ do).sum(2)


def _seen(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Return which keys each query sees, bool `[T, N]`."""
    keys = k.shape[-2]
    at = torch.arange(keys - q.shape[-2], keys, device=q.device).unsqueeze(1)
    keys_at = torch.arange(keys, device=q.device)
    return (keys_at <= at) & (keys_at > at - window)
