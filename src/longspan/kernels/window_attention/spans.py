"""A window as spans: query t reads the keys of its window, which are one span, and neighbours read nearly the same.

Rows are ordered by query, all heads of a group beside each other, so that a tile of span attention holds few queries.
It serves where span attention's kernel with parted warps does (2.1 for 2.4 ms: docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.span_attention import launch


def serves(q: Tensor, k: Tensor, v: Tensor, out_dtype: torch.dtype) -> bool:
    """Return whether that kernel serves a window of these queries, keys and values."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return launch.parts(q, Held(k), Held(v), rows, out_dtype)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend to the window; arguments and results as in the reference."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = heads // kv_heads * queries
    hi = torch.arange(keys - queries, keys, dtype=torch.int32, device=q.device)
    lo = (hi - (window - 1)).clamp(min=0)
    lo, hi = (x.expand(batch * heads, -1).reshape(batch, kv_heads, rows) for x in (lo, hi))
    order = torch.arange(batch * heads * queries, device=q.device).view(batch * kv_heads, -1, queries)
    out, lse = launch.span_attention(
        q.reshape(batch, kv_heads, rows, dim), k, v, lo, hi, scale=scale,
        order=order.mT.reshape(batch * kv_heads, rows), out_dtype=out_dtype,
    )  # fmt: skip
    return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)
