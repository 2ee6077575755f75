"""Span attention as a Triton kernel: rows sorted by where their span begins, a tile of rows a program.

Neighbouring rows of a tile read nearly the same keys, so a tile is flash attention over the keys between its first and
its last: online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1). Blocks that every row of the tile reads
wholly need no mask; only those at the two ends do. Float32 inputs are multiplied as three TF32 products, which keeps
float32's precision to a few last bits; half types directly. Sums are float32.

A row's result depends on its own span alone: not on the rows that share its tile, nor on the order of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.held_triton import load_rows

_NOWHERE = torch.iinfo(torch.int64).max
_LOG2E, _LN2 = 1.4426950408889634, 0.6931471805599453


@triton.jit
def _step(
    n, stop, b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
    p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
    i_head, o_d, o_dv, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Read one block of keys: running maximum (base 2), sum of weights, and output."""
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < stop
    if TMA:
        b_k = p_k_codes.load([k_slots + n, 0])
    else:
        b_k = load_rows(
            p_k, p_k_table, p_k_codes, p_k_scales, s_k_head, s_k_slot, s_k_token, k_slots,
            i_head, o_n, m_n, o_d, D, KIND, SHIFT,
        )  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)  # [BLOCK_R, BLOCK_N]
    if TMA:
        b_v = p_v_codes.load([v_slots + n, 0])
    else:
        b_v = load_rows(
            p_v, p_v_table, p_v_codes, p_v_scales, s_v_head, s_v_slot, s_v_token, v_slots,
            i_head, o_n, m_n, o_dv, DV, KIND, SHIFT,
        ).to(b_q.dtype)  # fmt: skip
    if MASKED:
        # A value that is not finite would spoil rows that don't read it (0 * NaN): it counts as 0, and makes the score
        # of its key NaN, which rows that don't read it never see. Number minus itself is 0, or NaN if not finite.
        b_s += tl.sum((b_v - b_v).to(tl.float32), 1)[None, :]
        b_v = tl.where(tl.abs(b_v) < float("inf"), b_v, 0.0)
        m_read = m_some[:, None] & (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] <= b_hi[:, None])
        b_s = tl.where(m_read, b_s, float("-inf"))
        # NaN among the scores is lost in a maximum, not in the sum of the weights.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_base = b_new
    b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_keep = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None], input_precision=PRECISION)
    return b_new, b_sum, b_out


@triton.jit
def _span_attention_kernel(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lo, p_hi, p_order, p_out, p_lse,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    rows, kv_heads, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr,
    KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, SPARSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_tile, i_both = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_sequence, i_head = i_both // kv_heads, i_both % kv_heads
    o_sorted = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_sorted < rows
    o_row = tl.load(p_order + i_both * rows + o_sorted, mask=m_row, other=0)  # [BLOCK_R], through all heads
    b_lo = tl.load(p_lo + o_row, mask=m_row, other=1).to(tl.int32)
    b_hi = tl.load(p_hi + o_row, mask=m_row, other=0).to(tl.int32)
    m_some = m_row & (b_lo <= b_hi)
    start = tl.min(tl.where(m_some, b_lo, 2147483647), 0)
    stop = tl.max(tl.where(m_some, b_hi, -1), 0) + 1

    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    p_rows = p_q + (o_row // SHARE)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_R, B_D]
    p_k += i_sequence * s_k_sequence
    p_k_table += i_sequence * s_k_table
    p_v += i_sequence * s_v_sequence
    p_v_table += i_sequence * s_v_table
    if TMA:
        k_slots = ((i_sequence * s_k_sequence + i_head * s_k_head) // s_k_token).to(tl.int32)
        v_slots = ((i_sequence * s_v_sequence + i_head * s_v_head) // s_v_token).to(tl.int32)
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, B_DV], tl.float32)
    if start < stop:
        first = start // BLOCK_N * BLOCK_N  # loads begin at whole blocks
        # What every row reads wholly: from the last beginning to the first end.
        inner = tl.cdiv(tl.max(tl.where(m_some, b_lo, 0), 0), BLOCK_N) * BLOCK_N
        outer = (tl.min(tl.where(m_some, b_hi, 2147483646), 0) + 1) // BLOCK_N * BLOCK_N
        if inner >= outer:
            inner = tl.cdiv(stop, BLOCK_N) * BLOCK_N
            outer = inner
        ends = (inner - first) // BLOCK_N
        for i in tl.range(0, ends + tl.cdiv(stop - outer, BLOCK_N)):
            n = tl.where(i < ends, first + i * BLOCK_N, outer + (i - ends) * BLOCK_N)
            if SPARSE:
                touched = tl.max((m_some & (b_lo < n + BLOCK_N) & (b_hi >= n)).to(tl.int32), 0)
            else:
                touched = 1
            if touched > 0:
                b_max, b_sum, b_out = _step(
                    n, stop, b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
                    p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
                    s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
                    i_head, o_d, o_dv, scale, D, DV, BLOCK_N, KIND, SHIFT, PRECISION, True, TMA,
                )  # fmt: skip
        for n in tl.range(inner, outer, BLOCK_N):
            b_max, b_sum, b_out = _step(
                n, n + BLOCK_N, b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
                p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
                s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
                i_head, o_d, o_dv, scale, D, DV, BLOCK_N, KIND, SHIFT, PRECISION, False, TMA,
            )  # fmt: skip
    m_none = (b_sum == 0.0) | (m_some == 0)
    b_lse = (b_max + tl.log2(tl.where(m_none, 1.0, b_sum))) * 0.6931471805599453
    b_lse = tl.where(m_none, float("-inf"), b_lse)
    b_out = b_out / tl.where(m_none, 1.0, b_sum)[:, None]
    b_out = tl.where(m_none[:, None], 0.0, b_out)
    tl.store(p_lse + o_row, b_lse, mask=m_row)
    p_outs = p_out + o_row[:, None] * DV + o_dv[None, :]
    tl.store(p_outs, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])


def span_attention(
    q: Tensor, k: Tensor | Held, v: Tensor | Held, lo: Tensor, hi: Tensor, *, scale: float,
    order: Tensor | None = None, dtype: torch.dtype = torch.float32, config: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from every row to the keys `lo .. hi`; arguments and results as in the reference, and beyond it:

    Args:
        q: `[B, H, R, D]`, or `[B, H, R / s, D]` where s neighbouring rows share one.
        k: a tensor (maybe a view with strides of its own), or pages.
        v: the same.
        lo: int32 or int64 `[B, H, R]`.
        hi: the same.
        scale: as in the reference.
        order: int64 `[B * H, R]`: the rows of each KV head, numbered through all of them, in an order in which
            neighbours read nearly the same keys and those that read nothing come last; None: found here.
        dtype: of the outputs.
        config: blocks, warps and stages; None: those for this device.
    """
    k = k if isinstance(k, Held) else Held(k if k.stride(-1) == 1 else k.contiguous())
    v = v if isinstance(v, Held) else Held(v if v.stride(-1) == 1 else v.contiguous())
    batch, heads, rows = lo.shape
    dim, value_dim = q.shape[-1], v.dim
    out = torch.empty(batch, heads, rows, value_dim, dtype=dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if order is None:
        order = torch.argsort(torch.where(lo <= hi, lo, torch.iinfo(lo.dtype).max), dim=-1).view(batch * heads, rows)
        order = order + torch.arange(batch * heads, device=q.device).unsqueeze(1) * rows
    q, lo, hi = q.to(k.rows.dtype).contiguous(), lo.contiguous(), hi.contiguous()
    config = config or _config(q, value_dim)
    k_rows, k_table, k_codes, k_scales, *k_strides = k.arguments()
    v_rows, v_table, v_codes, v_scales, *v_strides = v.arguments()
    tma = config.get("TMA", False)
    if tma:
        from triton.tools.tensor_descriptor import TensorDescriptor
        N = k_rows.shape[0]*k_rows.shape[1]*k_rows.shape[2]
        k_codes = TensorDescriptor(k_rows, [N, dim], [k_strides[3], 1], [config["BLOCK_N"], dim])
        v_codes = TensorDescriptor(v_rows, [N, dim], [v_strides[3], 1], [config["BLOCK_N"], dim])
    config = {"TMA": False, **config}
    _span_attention_kernel[(triton.cdiv(rows, config["BLOCK_R"]), batch * heads)](
        q, k_rows, k_table, k_codes, k_scales, v_rows, v_table, v_codes, v_scales,
        lo, hi, order, out, lse, *k_strides, *v_strides, rows, heads, scale * _LOG2E,
        D=dim, DV=value_dim,
        B_D=max(16, triton.next_power_of_2(dim)), B_DV=max(16, triton.next_power_of_2(value_dim)),
        SHARE=rows // q.shape[2], KIND=k.kind, SHIFT=k.shift,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        # Few rows lie far apart: blocks that none of them reads are then passed over.
        SPARSE=rows // config["BLOCK_R"] * 8192 < k.capacity,
        **config,
    )  # fmt: skip
    return out, lse


def _config(q: Tensor, value_dim: int) -> dict[str, Any]:
    """Return blocks, warps and stages."""
    exact, wide = q.dtype == torch.float32, max(q.shape[-1], value_dim) > 128
    if not exact and not wide and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9:
        return {"BLOCK_R": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    # Shared memory of Ada and small Ampere chips (99 KiB) holds these blocks twice; float32 takes twice the bytes.
    block_r, block_n = (64, 32) if wide else (128, 32 if exact else 64)
    return {"BLOCK_R": block_r, "BLOCK_N": block_n, "num_warps": 8 if exact else 4, "num_stages": 2}
