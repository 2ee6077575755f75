"""RMSNorm as one Triton kernel: a program sums and normalises whole rows, each read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 4096
"""Numbers that a program holds: rows narrower than this come several at once."""


@triton.jit
def _rmsnorm_kernel(
    p_x, p_residual, p_weight, p_normed, p_sum, s_x, s_residual, rows, eps,
    C: tl.constexpr, B_C: tl.constexpr, BLOCK_R: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    o_r, o_c = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, B_C)
    m = (o_r < rows)[:, None] & (o_c < C)[None, :]
    b_x = tl.load(p_x + o_r[:, None] * s_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)  # [BLOCK_R, B_C]
    if ADD:
        b_x += tl.load(p_residual + o_r[:, None] * s_residual + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + o_r[:, None] * C + o_c[None, :], b_sum, mask=m)
        b_x = b_sum.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / C + eps)  # [BLOCK_R]
    b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_x = b_x * b_scale[:, None] * b_weight[None, :]
    tl.store(p_normed + o_r[:, None] * C + o_c[None, :], b_x.to(p_normed.dtype.element_ty), mask=m)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Add and normalise; arguments and results as in the reference. `warps` of a program; None: by the width."""
    width = x.shape[-1]
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    if x.numel() == 0:
        return normed, total
    rows = _rows_of(x)
    others = rows if residual is None else _rows_of(residual)
    block_c = triton.next_power_of_2(width)
    block_r = max(1, min(_AT_ONCE // block_c, triton.next_power_of_2(rows.shape[0])))
    _rmsnorm_kernel[(triton.cdiv(rows.shape[0], block_r),)](
        rows, others, weight, normed, total, rows.stride(0), others.stride(0), rows.shape[0], eps,
        C=width, B_C=block_c, BLOCK_R=block_r, ADD=residual is not None,
        num_warps=warps or (4 if block_r * block_c <= 2048 else 8),
    )  # fmt: skip
    return normed, total


def _rows_of(x: Tensor) -> Tensor:
    """Return x as rows `[R, C]` whose channels lie together: a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
