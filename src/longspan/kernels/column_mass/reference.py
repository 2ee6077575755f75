"""How much attention each key gets, given the log-sum-exp of each query: column sums of the softmax, or its maxima.

`mass_j = sum over queries t and the query heads of a group of exp(scale * q_t . k_j - lse_t)`. Fused attention gives no
weights, but it gives the log-sum-exp, so that one more product of queries and keys gives every weight exactly. Queries
go in tiles: the weights of a whole chunk are never held at once.

A key that a query does not see adds nothing to its sum, whatever it holds (NaN, say).
It does not know positions or pages: queries and keys come as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_HELD = 1 << 23
"""Weights that are held at once (32 MiB in float32)."""


def column_mass(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """Return the attention mass of every key, summed over queries and over the query heads of its KV head.

    Args:
        q: `[B, Hq, T, D]`; the i-th query sees the keys `0 .. N - T + i`.
        k: `[B, Hkv, N, D]`, N at least T; query head h reads KV head `h // (Hq // Hkv)`.
        lse: `[B, Hq, T]`, of the scores that each query sees.
        scale: what the scores are multiplied by.

    Returns:
        `[B, Hkv, N]` in q's type (float32 for the half types): all of it sums to `B * Hq * T`.
    """
    mass = _zeros(q, k)
    for weights in _weights(q, k, lse, scale):
        mass[:, :, : weights.shape[-1]] += weights.sum((2, 3))
    return mass


def column_most(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """Return the most attention that any one query head of any query gives to every key.

    Arguments and shapes as for `column_mass`; what no query sees gets 0.
    """
    most = _zeros(q, k)
    for weights in _weights(q, k, lse, scale):
        seen = most[:, :, : weights.shape[-1]]
        torch.maximum(seen, weights.amax((2, 3)), out=seen)
    return most


def _zeros(q: Tensor, k: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.zeros(k.shape[:3], dtype=dtype, device=q.device)


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Iterator[Tensor]:
    """Yield the weights `[B, Hkv, Hq // Hkv, tile, n]` of a tile of queries for the n first keys, all that it sees."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, count, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group, before = heads // kv_heads, keys - count
    k, lse = k.to(dtype), lse.to(dtype).view(batch, kv_heads, group, count)
    grouped = (q.to(dtype) * scale).reshape(batch, kv_heads, group, count, dim)
    step = max(1, _HELD // (batch * heads * keys))
    for start in range(0, count, step):
        stop = min(start + step, count)
        seen = before + stop
        tile = grouped[:, :, :, start:stop].reshape(batch, kv_heads, group * (stop - start), dim)
        scores = (tile @ k[:, :, :seen].mT).view(batch, kv_heads, group, stop - start, seen)
        weights = torch.exp(scores - lse[..., start:stop].unsqueeze(-1))
        # Of the last keys, those that are newer than the query.
        newer = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        weights[..., before + start :].masked_fill_(newer, 0.0)
        yield weights
