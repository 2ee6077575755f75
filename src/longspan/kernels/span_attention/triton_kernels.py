"""Span attention as a Triton kernel: rows sorted by where their span begins, a tile of rows a program.

Neighbouring rows of a tile read nearly the same keys, so a tile is flash attention over the keys between its first and
its last: online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1). Blocks that every row of the tile reads
wholly need no mask; only those at the two ends do. Float32 inputs are multiplied as three TF32 products, which keeps
float32's precision to a few last bits; half types directly. Sums are float32.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from longspan.kernels.held_triton import load_rows

LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _walk(
    b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
    p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
    i_head, start, left, edge, blocks, turn, stop, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, SPARSE: tl.constexpr, CAREFUL: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Take blocks of keys into the online softmax: `left` from `start` on, the others from `edge` on.

    Without a mask all are from `start` on, in order but for the first `turn`, which come last.

    Where copies are the engine's (TMA), `p_k_codes` and `p_v_codes` describe keys and values as rows one after another,
    and `k_slots`, `v_slots` are this head's first row (of pages: its first slot's).
    """
    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    for i in tl.range(0, blocks):
        if MASKED:
            n = tl.where(i < left, start, edge - left * BLOCK_N) + i * BLOCK_N
        elif TURNED:
            n = start + tl.where(i + turn < blocks, i + turn, i + turn - blocks) * BLOCK_N
        else:
            n = start + i * BLOCK_N
        o_n = n + tl.arange(0, BLOCK_N)
        touched = tl.max((m_some & (b_lo < n + BLOCK_N) & (b_hi >= n)).to(tl.int32), 0) if SPARSE else 1
        if touched > 0:
            m_n = o_n < stop
            if TMA:
                k_row, v_row = k_slots + n, v_slots + n
                if K_KIND == 1:
                    k_row = k_slots + tl.load(p_k_table + n // 64).to(tl.int32) * 64 + n % 64
                if V_KIND == 1:
                    v_row = v_slots + tl.load(p_v_table + n // 64).to(tl.int32) * 64 + n % 64
                b_k = p_k_codes.load([k_row, 0])
                b_v = p_v_codes.load([v_row, 0])
            else:
                b_k = load_rows(
                    p_k, p_k_table, p_k_codes, p_k_scales, s_k_head, s_k_slot, s_k_token, k_slots,
                    i_head, o_n, m_n, o_d, D, K_KIND, SHIFT,
                ).to(b_q.dtype)  # fmt: skip
                b_v = load_rows(
                    p_v, p_v_table, p_v_codes, p_v_scales, s_v_head, s_v_slot, s_v_token, v_slots,
                    i_head, o_n, m_n, o_dv, DV, V_KIND, SHIFT,
                ).to(b_q.dtype)  # fmt: skip
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_R, BLOCK_N]
            if CAREFUL:
                # A value that is not finite counts as 0, and makes the score of its key NaN, which rows that don't
                # read it never see. A number minus itself is 0, or NaN if it is not finite.
                b_s += tl.sum((b_v - b_v).to(tl.float32), 1)[None, :]
                b_v = tl.where(tl.abs(b_v) < float("inf"), b_v, 0.0)
            if MASKED:
                m_read = m_some[:, None] & (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] <= b_hi[:, None])
                b_s = tl.where(m_read, b_s, float("-inf"))
            # NaN among the scores is lost in a maximum, not in the sum of the weights.
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
            b_p = tl.exp2(b_s * scale - b_base[:, None])
            b_keep = tl.exp2(b_max - b_base)
            b_sum = b_sum * b_keep + tl.sum(b_p, 1)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None], input_precision=PRECISION)
            b_max = b_new
    return b_max, b_sum, b_out


@triton.jit
def _tile(
    i_tile, i_both,
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lo, p_hi, p_order, p_out, p_lse,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    rows, kv_heads, beat, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    SPARSE: tl.constexpr, TMA: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of rows."""
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
        if K_KIND + V_KIND > 0:
            start = start // BLOCK_N * BLOCK_N  # no block crosses the end of a page
        # What every row reads wholly, from the last beginning to the first end, needs no mask.
        left = tl.cdiv(tl.max(tl.where(m_some, b_lo, 0), 0) - start, BLOCK_N)
        whole = tl.maximum((tl.min(tl.where(m_some, b_hi, 2147483646), 0) + 1 - start) // BLOCK_N - left, 0)
        if whole == 0:
            left = tl.cdiv(stop - start, BLOCK_N)
        middle = start + left * BLOCK_N
        edge = middle + whole * BLOCK_N
        # Tiles that run at the same time begin their whole blocks near the same multiples of `beat` and go on side by
        # side, so that a block of keys comes from memory once for all tiles that read it.
        turn = 0
        if TURNED:
            turn = (tl.cdiv(middle, beat) * beat - middle) // BLOCK_N
            turn = tl.where(turn < whole, turn, 0)
        b_max, b_sum, b_out = _walk(
            b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
            p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
            s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
            i_head, start, left, edge, left + tl.cdiv(tl.maximum(stop - edge, 0), BLOCK_N), 0, stop, scale,
            D, DV, B_D, B_DV, BLOCK_N, K_KIND, V_KIND, SHIFT, PRECISION, TMA, True, SPARSE, False, False,
        )  # fmt: skip
        b_max, b_sum, b_out = _walk(
            b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
            p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
            s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
            i_head, middle, 0, 0, whole, turn, edge, scale,
            D, DV, B_D, B_DV, BLOCK_N, K_KIND, V_KIND, SHIFT, PRECISION, TMA, False, False, False, TURNED,
        )  # fmt: skip
        clean = tl.min(tl.min((tl.abs(b_out) <= float("inf")).to(tl.int32), 1), 0)  # NaN compares false
        if clean == 0:
            # A value that is not finite spoils rows that don't read it (0 * NaN): once more, with care.
            b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
            b_sum = tl.zeros([BLOCK_R], tl.float32)
            b_out = tl.zeros([BLOCK_R, B_DV], tl.float32)
            b_max, b_sum, b_out = _walk(
                b_q, b_lo, b_hi, m_some, b_max, b_sum, b_out,
                p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
                s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
                i_head, start, 0, start, tl.cdiv(stop - start, BLOCK_N), 0, stop, scale,
                D, DV, B_D, B_DV, BLOCK_N, K_KIND, V_KIND, SHIFT, PRECISION, TMA, True, SPARSE, True, False,
            )  # fmt: skip
    m_none = (b_sum == 0.0) | (m_some == 0)
    b_lse = (b_max + tl.log2(tl.where(m_none, 1.0, b_sum))) * LN_2
    b_out = tl.where(m_none[:, None], 0.0, b_out / tl.where(m_none, 1.0, b_sum)[:, None])
    tl.store(p_lse + o_row, tl.where(m_none, float("-inf"), b_lse), mask=m_row)
    p_outs = p_out + o_row[:, None] * DV + o_dv[None, :]
    tl.store(p_outs, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])


@triton.jit
def _span_attention_kernel(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lo, p_hi, p_order, p_out, p_lse,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    rows, kv_heads, beat, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    SPARSE: tl.constexpr, TMA: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    _tile(
        tl.program_id(0), tl.program_id(1).to(tl.int64),
        p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
        p_lo, p_hi, p_order, p_out, p_lse,
        s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
        s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
        rows, kv_heads, beat, scale,
        D, DV, B_D, B_DV, BLOCK_R, BLOCK_N, SHARE, K_KIND, V_KIND, SHIFT, PRECISION, SPARSE, TMA, TURNED,
    )  # fmt: skip


@triton.jit
def _marked_tiles_kernel(
    p_marked, tiles,
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lo, p_hi, p_order, p_out, p_lse,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    rows, kv_heads, beat, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SHARE: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    SPARSE: tl.constexpr, TMA: tl.constexpr, TURNED: tl.constexpr,
    B_M: tl.constexpr,
):  # fmt: skip
    """Attend with those of B_M tiles that are marked."""
    i_first, i_both = tl.program_id(0) * B_M, tl.program_id(1).to(tl.int64)
    p_marked += i_both * ((tiles + 1) // 2 * 2)  # two marks for each tile of the other kernel
    o_m = i_first + tl.arange(0, B_M)
    if tl.max(tl.load(p_marked + o_m, mask=o_m < tiles, other=0), 0) != 0:
        for i_tile in tl.range(i_first, tl.minimum(i_first + B_M, tiles)):
            if tl.load(p_marked + i_tile) != 0:
                _tile(
                    i_tile, i_both,
                    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
                    p_lo, p_hi, p_order, p_out, p_lse,
                    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
                    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
                    rows, kv_heads, beat, scale,
                    D, DV, B_D, B_DV, BLOCK_R, BLOCK_N, SHARE, K_KIND, V_KIND, SHIFT, PRECISION, SPARSE, TMA, TURNED,
                )  # fmt: skip
