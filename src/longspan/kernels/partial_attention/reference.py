"""Attention over a part of the keys, in plain PyTorch: the truth that faster versions are tested against.

A part's result carries its log-sum-exp, so that parts computed apart (window and spans, pages, ranks) merge into
exactly the softmax over all of them: with `o_p` and `l_p` of part p, `l = log sum_p exp(l_p)` and
`o = sum_p exp(l_p - l) o_p` (the LSE merge of FlashAttention, arXiv 2205.14135, section 3.1).

What is masked never reaches an output, whatever it holds: NaN or infinity in a masked key or value changes nothing,
while NaN in a key or value that a query does attend to appears in that query's output.
It does not know positions, pages or mechanisms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q to one part of the keys.

    Args:
        q: `[B, Hq, T, D]`, any float type; computed in float32 (float64 stays float64).
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        mask: bool, broadcastable to `[B, Hq, T, N]`, True where the query attends; None: everywhere.
        scale: what the scores are multiplied by, usually `1/sqrt(D)`.

    Returns:
        `(out, lse)`: `[B, Hq, T, Dv]` and `[B, Hq, T]` in the computing type. A query that attends to nothing has
        out 0 and lse -inf, so that it weighs nothing in a merge.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    k, v = k.to(dtype), v.to(dtype)
    grouped = q.to(dtype).reshape(batch, kv_heads, group * queries, dim)
    scores = ((grouped * scale) @ k.transpose(-1, -2)).view(batch, heads, queries, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    # A row without keys has lse -inf: subtracting it would give NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    unusable = None
    if mask is not None:
        unusable = ~torch.isfinite(v).all(-1)  # [B, Hkv, N]
        if unusable.any():
            v = v.masked_fill(unusable.unsqueeze(-1), 0.0)  # 0 * NaN would be NaN
        else:
            unusable = None
    out = (weights.view(batch, kv_heads, group * queries, keys) @ v).view(batch, heads, queries, v.shape[-1])
    if unusable is not None:
        seen = torch.broadcast_to(mask, scores.shape) if mask is not None else torch.ones_like(scores, dtype=torch.bool)
        reached = (seen & unusable.repeat_interleave(group, 1).unsqueeze(2)).any(-1, keepdim=True)
        out = out.masked_fill(reached, float("nan"))
    return out, lse


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge parts that share no key into the softmax over all of them.

    Args:
        outs: `[P, ..., Dv]`, one output a part.
        lses: `[P, ...]`, natural logarithms; -inf marks a part without keys.

    Returns:
        `(out [..., Dv], lse [...])`. Where no part has a key: 0 and -inf.
    """
    lse = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - lse.masked_fill(lse == float("-inf"), 0.0))
    # A part that weighs nothing must not spoil the sum if it holds NaN or infinity.
    parts = torch.where(weights.unsqueeze(-1) > 0, outs, torch.zeros_like(outs))
    parts = torch.where(weights.isnan().unsqueeze(-1), outs, parts)
    return (weights.unsqueeze(-1) * parts).sum(0), lse
