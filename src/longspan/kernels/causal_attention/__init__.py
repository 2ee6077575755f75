"""Causal attention from the last queries of a context to all of its keys; see `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.causal_attention import cpu, cuda, reference
from longspan.kernels.partial_attention import merge_partials, partial_attention

__all__ = ["causal_attention", "cpu", "cuda", "reference"]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend with the fastest version that serves; arguments and results as in `reference.causal_attention`."""
    if cpu.serves(q, k, v):
        return cpu.causal_attention(q, k, v, scale=scale)
    if cuda.serves(q, k, v):
        return cuda.causal_attention(q, k, v, scale=scale)
    count, first = q.shape[2], k.shape[2] - q.shape[2]
    triangle = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
    near = partial_attention(q, k[:, :, first:], v[:, :, first:], triangle, scale=scale)
    if first == 0:
        return near[0]
    past = partial_attention(q, k[:, :, :first], v[:, :, :first], scale=scale)
    return merge_partials(torch.stack([past[0], near[0]]), torch.stack([past[1], near[1]]))[0]
