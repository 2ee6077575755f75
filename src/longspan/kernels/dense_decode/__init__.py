"""Attention of the newest token of every sequence to all its keys, from pages or tensors; see `reference.py`."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longspan.kernels.dense_decode import reference
from longspan.kernels.held import Held

__all__ = ["decode", "partial", "serves"]

_TRITON = importlib.util.find_spec("triton") is not None


def serves(q: Tensor, k: Held, v: Held) -> bool:
    """Return whether kernels serve queries `[B, Hq, D]` with these keys and values (device, types, head sizes)."""
    return (
        _TRITON
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and k.rows.dtype == v.rows.dtype
        and k.rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(k.dim, v.dim) <= 256
    )


def decode(q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, per_token: Tensor | None = None) -> Tensor:
    """Attend from the newest token of every sequence with the fastest version that serves; see `reference.decode`."""
    if serves(q, k, v):
        from longspan.kernels.dense_decode import triton_kernels

        return triton_kernels.decode(q, k, v, lengths, scale=scale, per_token=per_token)
    return reference.decode(q, k, v, lengths, scale=scale, per_token=per_token)


def partial(q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to a part of each sequence, with its log-sum-exp; see `reference.partial`, without rotation."""
    if serves(q, k, v):
        from longspan.kernels.dense_decode import triton_kernels

        return triton_kernels.partial(q, k, v, lengths, scale=scale)
    return reference.partial(q, k, v, lengths, scale=scale)
