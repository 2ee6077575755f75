"""Dense causal attention and its gradients from the equation, in float64, over all positions at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from the last T of N positions."""
    group, (count, length) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
    scores = (q.double() @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def inputs(length: int, queries: int | None = None, *, heads=(4, 2), dims=(8, 8), batch=1, dtype=torch.float32, seed=0):
    """Random q of the last positions, and k and v of all."""
    generator = torch.Generator().manual_seed(seed + length)
    sizes = [
        (batch, heads[0], length if queries is None else queries, dims[0]),
        (batch, heads[1], length, dims[0]),
        (batch, heads[1], length, dims[1]),
    ]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
