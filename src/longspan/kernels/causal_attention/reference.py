"""Causal attention from the last T of N positions, in plain PyTorch: the truth that faster versions are tested against.

`out_i = softmax(q_i K_{0..N-T+i} scale) V_{0..N-T+i}` (arXiv 1706.03762, equation 1). A key or value behind a query
never reaches its output, whatever it holds; NaN in one that the query sees does. It does not know positions or pages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention.reference import partial_attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend causally from the last positions.

    Args:
        q: `[B, Hq, T, D]`, any float type; computed in float32 (float64 stays float64).
        k: `[B, Hkv, N, D]`, N at least T; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        scale: what scores are multiplied by, usually `1/sqrt(D)`.

    Returns:
        `[B, Hq, T, Dv]` in the computing type.
    """
    count, keys = q.shape[2], k.shape[2]
    mask = torch.ones(count, keys, dtype=torch.bool, device=q.device).tril(keys - count)
    return partial_attention(q, k, v, mask, scale=scale)[0]
