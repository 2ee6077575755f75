"""Attention from blocks of queries to chosen blocks of keys and, causally, to their own: the truth, in plain PyTorch.

Queries are the last T of N positions, in blocks of M at multiples of M. A query reads its own block up to itself and
the earlier blocks that were chosen for its block, in one softmax. What it does not read never reaches its output,
whatever it holds; NaN in what it reads does. It does not know who chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention.reference import partial_attention


def block_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, scale: float) -> Tensor:
    """Attend from whole blocks of queries.

    Args:
        q: `[B, Hq, T, D]`, any float type; computed in float32 (float64 stays float64).
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        chosen: bool `[B, Hq, T / M, P]`, with P at most `N / M - 1`: the blocks of keys that each block of queries
            reads; True only for blocks before it.
        scale: what scores are multiplied by, usually `1/sqrt(D)`.

    Returns:
        `[B, Hq, T, Dv]` in the computing type.
    """
    count, keys = q.shape[2], k.shape[2]
    block = count // chosen.shape[2]
    at = torch.arange(keys - count, keys, device=q.device).unsqueeze(1)
    key = torch.arange(keys, device=q.device)
    own = (key <= at) & (key // block == at // block)
    far = torch.nn.functional.pad(chosen, (0, keys // block - chosen.shape[3]))
    far = far.repeat_interleave(block, 2).repeat_interleave(block, 3)
    return partial_attention(q, k, v, own | far, scale=scale)[0]
