"""Superlinear attention in kernels: a decode step, and search, spans and merge of prefill; see `README.md`.

The plain versions are `reference.py` for a decode step, and `attention/superlinear.py` for prefill.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.superlinear import reference
from longspan.kernels.superlinear.search import Search, Turn, offsets

__all__ = ["MOST_SPANS", "Search", "Turn", "decode", "offsets", "serves"]

MOST_SPANS = 4
"""Spans that the search of prefill keeps in registers."""

_TRITON = importlib.util.find_spec("triton") is not None


def serves(q: Tensor, k: Held, v: Held, search: Search) -> bool:
    """Return whether kernels serve queries `[B, Hq, T, D]` with these keys and values (device, types, head sizes)."""
    return (
        _TRITON
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and k.rows.is_cuda
        and k.rows.dtype == v.rows.dtype
        and k.rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(k.dim, v.dim) <= 256
        and search.spans <= MOST_SPANS
    )


def decode(
    q: Tensor, k: Held, v: Held, lengths: Tensor, search: Search, *, scale: float,
    routing_query: Tensor | None = None, search_keys: Held | None = None, turn: Turn | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the newest token of every sequence; see `reference.decode`. The result has q's type."""
    if serves(q, k, v, search):
        from longspan.kernels.superlinear import triton_decode

        return triton_decode.decode(
            q, k, v, lengths, search, scale=scale, routing_query=routing_query, search_keys=search_keys, turn=turn
        )
    return reference.decode(
        q, k, v, lengths, search, scale=scale, routing_query=routing_query, search_keys=search_keys, turn=turn
    ).to(q.dtype)
