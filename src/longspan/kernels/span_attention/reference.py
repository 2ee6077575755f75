"""Attention of many rows, each to a span of keys of its own, in plain PyTorch: the truth for faster versions.

A row is one query of one head and one of its spans; rows of one KV head share its keys. A mask over all keys says which
a row reads: quadratic, for tests. `attention/spans.py` has the sub-quadratic form for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention import reference


def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    scale: float,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every row to the keys `lo .. hi`.

    Args:
        q: rows `[B, H, R, D]`, or `[B, H, R / s, D]` where s neighbouring rows share one, any float type; computed in
            float32 (float64 stays float64).
        k: `[B, H, N, D]`.
        v: `[B, H, N, Dv]`.
        lo: int64 `[B, H, R]`, first key of each row's span.
        hi: int64 `[B, H, R]`, last key of it, at most N - 1; lo > hi: the row attends to nothing.
        scale: what scores are multiplied by.
        out_dtype: the type of `out`; None: the computing type.

    Returns:
        `(out [B, H, R, Dv], lse [B, H, R])`, lse in the computing type; 0 and -inf for a row that attends to nothing.
        What a row does not attend to never reaches its output, whatever it holds.
    """
    at = torch.arange(k.shape[2], device=q.device)
    mask = (at >= lo.unsqueeze(-1)) & (at <= hi.unsqueeze(-1))
    q = q.repeat_interleave(lo.shape[2] // q.shape[2], 2)
    out, lse = reference.partial_attention(q, k, v, mask, scale=scale)
    return (out if out_dtype is None else out.to(out_dtype)), lse
