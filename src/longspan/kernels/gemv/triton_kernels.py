"""A weight matrix times a few rows as a Triton kernel: every weight is read once, which is what takes the time.

A program loads whole rows of weights at once, before it needs anything else: on Hopper it starts before the kernel
before it has ended (programmatic dependent launch), so that the memory is never idle between two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.tiles import hopper


@dataclass(frozen=True)
class Cut:
    """Rows of weights that a program reads, the most columns at once, and its warps."""

    rows: int
    columns: int
    warps: int


@triton.jit(do_not_specialize=["M"])
def _gemv_kernel(
    p_x, p_w, p_residual, p_out, M, s_x, s_w, s_residual, s_out,
    K: tl.constexpr, S: tl.constexpr, B_S: tl.constexpr, B_R: tl.constexpr, B_K: tl.constexpr,
    RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    o_k, o_s = tl.arange(0, B_K), tl.arange(0, B_S)
    m_r = o_r < M
    p_ws = p_w + o_r.to(tl.int64)[:, None] * s_w + o_k[None, :]
    m_k = o_k < K
    b_w = tl.load(p_ws, mask=m_r[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")  # [B_R, B_K]
    if EARLY:
        gdc_wait()  # weights are nobody's result
    b_out = tl.zeros([B_S, B_R], tl.float32)
    for k in tl.static_range(0, K, B_K):
        if k > 0:
            m_k = k + o_k < K
            b_w = tl.load(p_ws + k, mask=m_r[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
        for s in tl.static_range(S):
            b_x = tl.load(p_x + s * s_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_sum = tl.sum(b_w.to(tl.float32) * b_x[None, :], 1)
            b_out += tl.where((o_s == s)[:, None], b_sum[None, :], 0.0)
    m = (o_s < S)[:, None] & m_r[None, :]
    if RESIDUAL:
        b_out += tl.load(p_residual + o_s[:, None] * s_residual + o_r[None, :], mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o_s[:, None] * s_out + o_r[None, :], b_out.to(p_out.dtype.element_ty), mask=m)


def gemv(
    x: Tensor, weight: Tensor, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
    cut: Cut | None = None, early: bool | None = None,
) -> Tensor:  # fmt: skip
    """Return `x weight^T`, plus a residual; see `reference.gemv`, and beyond it:

    Args:
        x: as there.
        weight: as there, the last axis without gaps.
        residual: as there.
        out_dtype: as there.
        cut: how; None: as `cut_for` says.
        early: whether the kernel starts before the one before it has ended; weights must be older than that. None: on
            Hopper.
    """
    count, depth = x.shape
    outs = weight.shape[0]
    assert weight.stride(-1) == 1, "weights of a row lie together"
    x = x if x.stride(-1) == 1 else x.contiguous()
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    out = torch.empty(count, outs, dtype=out_dtype or x.dtype, device=x.device)
    cut = cut or cut_for(outs, depth, weight.element_size())
    early = hopper(x.device) if early is None else early
    _gemv_kernel[(triton.cdiv(outs, cut.rows),)](
        x, weight, out if residual is None else residual, out,
        outs, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        K=depth, S=count, B_S=triton.next_power_of_2(count), B_R=cut.rows,
        B_K=min(cut.columns, triton.next_power_of_2(depth)), RESIDUAL=residual is not None, EARLY=early,
        num_warps=cut.warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def cut_for(outs: int, depth: int, size: int) -> Cut:
    """Return the cut for `[outs, depth]` weights of `size` bytes each."""
    columns = 4096 if size <= 2 else 2048
    if outs < 1024:
        return Cut(2, columns, 4)
    return Cut(4, columns, 4 if outs >= 8192 else 8)  # 8 warps where programs are too few to fill the chip
