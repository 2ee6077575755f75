"""Attention of many rows, each to a span of keys of its own, as one Triton kernel (Ampere and later).

Rows are sorted by where their span begins; a program takes `BLOCK_R` neighbours and walks over the keys from the first
span's beginning to the last one's end, with the online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1).
Blocks of keys that no row of the program reads are passed over unread. Float32 inputs are multiplied as three TF32
products, which keeps float32's precision to a few last bits; half types directly. Sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NOWHERE = torch.iinfo(torch.int64).max


@triton.jit
def _span_attention_kernel(
    p_q, p_k, p_v, p_lo, p_hi, p_order, p_out, p_lse,
    s_k_head, s_k_token, s_v_head, s_v_token,
    rows, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_tile, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_sorted = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_row = o_sorted < rows
    o_row = tl.load(p_order + i_head * rows + o_sorted, mask=m_row, other=0)  # [BLOCK_R] which rows
    b_lo = tl.load(p_lo + i_head * rows + o_row, mask=m_row, other=1)
    b_hi = tl.load(p_hi + i_head * rows + o_row, mask=m_row, other=0)
    m_some = m_row & (b_lo <= b_hi)
    start = tl.min(tl.where(m_some, b_lo, 9223372036854775807), 0)
    stop = tl.max(tl.where(m_some, b_hi, -1), 0) + 1

    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    p_rows = p_q + (i_head * rows + o_row)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_R, B_D]
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, B_DV], tl.float32)
    b_lost = tl.zeros([BLOCK_R], tl.int32)  # whether the row reads a value that is not finite
    if start < stop:
        first = start // BLOCK_N * BLOCK_N  # loads begin at whole blocks
        for n in range(first, stop, BLOCK_N):
            touched = tl.max((m_some & (b_lo < n + BLOCK_N) & (b_hi >= n)).to(tl.int32), 0)
            if touched > 0:
                o_n = n + tl.arange(0, BLOCK_N)
                m_n = o_n < stop
                p_keys = p_k + i_head * s_k_head + o_n[None, :] * s_k_token + o_d[:, None]
                b_k = tl.load(p_keys, mask=m_n[None, :] & (o_d < D)[:, None], other=0.0)  # [B_D, BLOCK_N]
                p_values = p_v + i_head * s_v_head + o_n[:, None] * s_v_token + o_dv[None, :]
                b_v = tl.load(p_values, mask=m_n[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BLOCK_N, B_DV]
                m_read = m_some[:, None] & (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] <= b_hi[:, None])
                b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
                b_s = tl.where(m_read, b_s, float("-inf"))
                # Values that are not finite (NaN compares false) would spoil rows that don't read them: 0 * NaN.
                m_lost = 1 - tl.min((tl.abs(b_v) < float("inf")).to(tl.int32), 1)  # [BLOCK_N]
                b_v = tl.where((m_lost > 0)[:, None], 0.0, b_v)
                b_lost = tl.maximum(b_lost, tl.max(m_read.to(tl.int32) * m_lost[None, :], 1))
                # NaN among the scores is lost in a maximum, not in the sum of the weights.
                b_new = tl.maximum(b_max, tl.max(b_s, 1))
                b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp(b_s - b_base[:, None])
                b_keep = tl.exp(b_max - b_base)
                b_sum = b_sum * b_keep + tl.sum(b_p, 1)
                b_out = b_out * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
                b_max = b_new
    b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_lse = tl.where(b_sum == 0.0, float("-inf"), b_base + tl.log(tl.where(b_sum == 0.0, 1.0, b_sum)))
    b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    b_out = tl.where((b_lost > 0)[:, None], float("nan"), b_out)
    tl.store(p_lse + i_head * rows + o_row, b_lse, mask=m_row)
    p_outs = p_out + (i_head * rows + o_row)[:, None] * DV + o_dv[None, :]
    tl.store(p_outs, b_out, mask=m_row[:, None] & (o_dv < DV)[None, :])


def span_attention(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from every row to the keys `lo .. hi`; arguments and results as in the reference.

    Keys and values keep their type (and may be views with strides of their own); rows are brought to it.
    """
    batch, heads, rows, dim = q.shape
    value_dim = v.shape[-1]
    out = torch.empty(batch, heads, rows, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    order = torch.argsort(torch.where(lo <= hi, lo, _NOWHERE), dim=-1)
    q, lo, hi = q.to(k.dtype).contiguous(), lo.contiguous(), hi.contiguous()
    if k.stride(-1) != 1:
        k = k.contiguous()
    if v.stride(-1) != 1:
        v = v.contiguous()
    exact, wide = k.dtype == torch.float32, max(dim, value_dim) > 128
    # Shared memory of Ada and small Ampere chips (99 KiB) holds these blocks twice; float32 takes twice the bytes.
    block_r, block_n = (64, 32) if wide else (128, 32 if exact else 64)
    options: dict[str, Any] = {"num_warps": 8 if exact else 4, "num_stages": 2}
    for b in range(batch):
        _span_attention_kernel[(triton.cdiv(rows, block_r), heads)](
            q[b], k[b], v[b], lo[b], hi[b], order[b], out[b], lse[b],
            k.stride(1), k.stride(2), v.stride(1), v.stride(2),
            rows, scale,
            D=dim, DV=value_dim,
            B_D=max(16, triton.next_power_of_2(dim)), B_DV=max(16, triton.next_power_of_2(value_dim)),
            BLOCK_R=block_r, BLOCK_N=block_n, PRECISION="tf32x3" if exact else "ieee",
            **options,
        )  # fmt: skip
    return out, lse
