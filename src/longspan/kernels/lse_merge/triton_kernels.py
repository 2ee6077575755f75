"""The merge of a part, and of the parts of all ranks, as one Triton kernel each: every number is read and written once.

Nothing is held beside: a ring over 512K queries merges 4.3 GB of float32 a pass; plain PyTorch would hold three more
tensors of that size. The parts of a decode step are few numbers: there it is one launch for some twenty.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 4096
"""Numbers that a program holds."""
_PROGRAMS = 64
"""Programs among which few rows are shared out."""


@triton.jit
def _merge_kernel(
    p_out, p_lse, p_part, p_part_lse, heads, rows,
    s_ob, s_oh, s_ot, s_lb, s_lh, s_lt, s_pb, s_ph, s_pt, s_qb, s_qh, s_qt,
    D: tl.constexpr, B_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_b, i_h = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    o_r, o_d = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, B_D)
    m_r = o_r < rows
    m = m_r[:, None] & (o_d < D)[None, :]
    p_lse += i_b * s_lb + i_h * s_lh + o_r * s_lt
    b_lse = tl.load(p_lse, mask=m_r, other=0.0)  # [BLOCK_R]
    b_other = tl.load(p_part_lse + i_b * s_qb + i_h * s_qh + o_r * s_qt, mask=m_r, other=0.0).to(tl.float32)
    b_high = tl.maximum(b_lse, b_other, propagate_nan=tl.PropagateNan.ALL)
    b_safe = tl.where(b_high == float("-inf"), 0.0, b_high)  # -inf - -inf would be NaN
    b_own, b_new = tl.exp(b_lse - b_safe), tl.exp(b_other - b_safe)
    b_sum = b_own + b_new
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_own, b_new = b_own / b_divisor, b_new / b_divisor
    b_total = tl.where(b_sum == 0.0, float("-inf"), b_safe + tl.log(b_divisor))
    p_out += i_b * s_ob + i_h * s_oh + o_r[:, None] * s_ot + o_d[None, :]
    b_out = tl.load(p_out, mask=m, other=0.0)  # [BLOCK_R, B_D]
    b_part = tl.load(p_part + i_b * s_pb + i_h * s_ph + o_r[:, None] * s_pt + o_d[None, :], mask=m, other=0.0)
    b_kept = tl.where((b_own == 0.0)[:, None], 0.0, b_own[:, None] * b_out)
    b_added = tl.where((b_new == 0.0)[:, None], 0.0, b_new[:, None] * b_part.to(tl.float32))
    tl.store(p_out, b_kept + b_added, mask=m)
    tl.store(p_lse, b_total, mask=m_r)


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part; arguments as in the reference, `out` and `lse` in float32."""
    batch, heads, rows, dim = out.shape
    if out.numel() == 0:
        return
    block_d = triton.next_power_of_2(dim)
    block_r = max(1, min(_AT_ONCE // block_d, triton.next_power_of_2(rows)))
    _merge_kernel[(triton.cdiv(rows, block_r), batch * heads)](
        out, lse, part, part_lse, heads, rows,
        *out.stride()[:3], *lse.stride(), *part.stride()[:3], *part_lse.stride(),
        D=dim, B_D=block_d, BLOCK_R=block_r,
    )  # fmt: skip


@triton.jit
def _packed_kernel(
    p_packed, p_out, p_lse, rows, s_p,
    PARTS: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    o_r, o_d = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, B_D)
    m_r = o_r < rows
    m = m_r[:, None] & (o_d < D)[None, :]
    p_row = p_packed + o_r * (D + 1)
    b_high = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for i_p in tl.static_range(PARTS):
        b_lse = tl.load(p_row + i_p * s_p + D, mask=m_r, other=0.0)  # [BLOCK_R]
        b_high = tl.maximum(b_high, b_lse, propagate_nan=tl.PropagateNan.ALL)
    b_safe = tl.where(b_high == float("-inf"), 0.0, b_high)  # -inf - -inf would be NaN
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    for i_p in tl.static_range(PARTS):
        b_sum += tl.exp(tl.load(p_row + i_p * s_p + D, mask=m_r, other=0.0) - b_safe)
    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = tl.zeros([BLOCK_R, B_D], tl.float32)
    for i_p in tl.static_range(PARTS):
        b_weight = tl.exp(tl.load(p_row + i_p * s_p + D, mask=m_r, other=0.0) - b_safe) / b_divisor
        b_part = tl.load(p_row[:, None] + i_p * s_p + o_d[None, :], mask=m, other=0.0)  # [BLOCK_R, B_D]
        b_out += tl.where((b_weight == 0.0)[:, None], 0.0, b_weight[:, None] * b_part)
    tl.store(p_out + o_r[:, None] * D + o_d[None, :], b_out, mask=m)
    tl.store(p_lse + o_r, tl.where(b_sum == 0.0, float("-inf"), b_safe + tl.log(b_divisor)), mask=m_r)


def merge_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Merge parts; arguments and result as in the reference, `packed` float32 without gaps."""
    parts, shape, dim = packed.shape[0], packed.shape[1:-1], packed.shape[-1] - 1
    rows = math.prod(shape)
    out, lse = (torch.empty(size, dtype=packed.dtype, device=packed.device) for size in ((*shape, dim), shape))
    if rows == 0:
        return out, lse
    block_d = triton.next_power_of_2(max(1, dim))
    # Few rows are shared out over many programs.
    block_r = max(1, min(_AT_ONCE // block_d, triton.next_power_of_2(triton.cdiv(rows, _PROGRAMS))))
    _packed_kernel[(triton.cdiv(rows, block_r),)](
        packed, out, lse, rows, packed.stride(0), PARTS=parts, D=dim, B_D=block_d, BLOCK_R=block_r
    )
    return out, lse
