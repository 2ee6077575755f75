"""Attention from blocks of queries to the blocks of keys that were chosen for them; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.block_attention import cpu, gathered, reference

__all__ = ["block_attention", "cpu", "gathered", "reference"]


def block_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, scale: float) -> Tensor:
    """Attend with the fastest version that serves; arguments and results as in `reference.block_attention`."""
    if cpu.serves(q, k, v):
        return cpu.block_attention(q, k, v, chosen, scale=scale)
    return gathered.block_attention(q, k, v, chosen, scale=scale)
