"""The gated norm of Mamba-2 as one Triton kernel: a program takes whole groups of channels, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 4096
"""Numbers that a program holds: groups narrower than this come several at once."""


@triton.jit
def gated_norm(
    p_y, p_gate, p_weight, p_out, o_r, m_r, s_y, s_gate, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, B_W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Gate and normalise the rows o_r: row r is group `r % GROUPS` of token `r // GROUPS`."""
    o_w, o_token, o_group = tl.arange(0, B_W), o_r // GROUPS, o_r % GROUPS
    o_c = o_group[:, None] * WIDTH + o_w[None, :]  # [R, B_W] channel
    m = m_r[:, None] & (o_w < WIDTH)[None, :]
    b_gate = tl.load(p_gate + o_token[:, None] * s_gate + o_c, mask=m, other=0.0).to(tl.float32)
    b_y = tl.load(p_y + o_token[:, None] * s_y + o_c, mask=m, other=0.0).to(tl.float32)
    b_y = b_y * b_gate * tl.sigmoid(b_gate)
    if NORM:
        b_scale = tl.rsqrt(tl.sum(b_y * b_y, 1) / WIDTH + eps)
        b_y = b_y * b_scale[:, None] * tl.load(p_weight + o_c, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o_token[:, None] * (GROUPS * WIDTH) + o_c, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _gated_norm_kernel(
    p_y, p_gate, p_weight, p_out, s_y, s_gate, rows, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, B_W: tl.constexpr, BLOCK_R: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    gated_norm(p_y, p_gate, p_weight, p_out, o_r, o_r < rows, s_y, s_gate, eps, GROUPS, WIDTH, B_W, NORM)


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor | None, groups: int, eps: float, *, warps: int = 8) -> Tensor:
    """Gate and normalise; arguments and results as in `reference.gated_rmsnorm`. `warps` of a program."""
    channels = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    rows_of_y, rows_of_gate = rows_of(y), rows_of(gate)
    width = channels // groups
    block_w = triton.next_power_of_2(width)
    rows = rows_of_gate.shape[0] * groups
    block_r = max(1, min(_AT_ONCE // block_w, triton.next_power_of_2(rows)))
    _gated_norm_kernel[(triton.cdiv(rows, block_r),)](
        rows_of_y, rows_of_gate, rows_of_gate if weight is None else weight, out,
        rows_of_y.stride(0), rows_of_gate.stride(0), rows, eps,
        GROUPS=groups, WIDTH=width, B_W=block_w, BLOCK_R=block_r, NORM=weight is not None, num_warps=warps,
    )  # fmt: skip
    return out


def rows_of(x: Tensor) -> Tensor:
    """Return x as rows `[R, C]` whose channels lie together: a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
