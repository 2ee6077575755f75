"""The search of superlinear attention as Triton kernels: the best anchors of a query, and their spans.

The query heads of one KV head share the anchors' keys: their scores are one small matrix product a query. Scores are
float32 sums of exact products. Ties go to the newer anchor, as everywhere: anchors are read from the newest on, and
only a greater score replaces another.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.held_triton import load_rows


@triton.jit
def reach_of(n, FACTOR: tl.constexpr, SPAN_POWER: tl.constexpr):
    """Return `ceil(FACTOR * n^SPAN_POWER)` in float64, as the reference computes it."""
    wide = n.to(tl.float64)
    length = tl.sqrt(wide) if SPAN_POWER == 0.5 else tl.exp2(tl.log2(wide) * SPAN_POWER)
    return tl.ceil(length * FACTOR).to(tl.int32)


@triton.jit
def best_of(b_s, b_i):
    """Return score and number of the best of each row `[R, C]`; of equals, the least number."""
    best = tl.max(b_s, 1)
    number = tl.min(tl.where(b_s == best[:, None], b_i, 2147483647), 1)
    return best, number


@triton.jit
def search_newest_kernel(
    p_q, p_rows, p_table, p_codes, p_scales, p_lengths, p_steps, p_best, p_anchor, p_written,
    s_q_sequence, s_q_head, s_sequence, s_head, s_slot, s_token, s_table, slots,
    steps,
    G: tl.constexpr, B_G: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr, B_A: tl.constexpr,
    SPANS: tl.constexpr, KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, SHARED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Find the best anchors of the newest query within one block of anchors: `[B, Hq, blocks, SPANS]`.

    It also sets the counts of written pieces to 0, `[B, Hq]`.
    """
    if EARLY:
        gdc_wait()  # before others may start: some of them do not wait for what this one waits for
        gdc_launch_dependents()
    i_block, i_head, i_sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.load(p_lengths + i_sequence).to(tl.int32)
    o_g, o_d, o_a = tl.arange(0, B_G), tl.arange(0, B_D), i_block * B_A + tl.arange(0, B_A)
    b_at = n - tl.load(p_steps + o_a, mask=o_a < steps, other=2147483647)  # [B_A] the anchors
    m_a = (o_a < steps) & (b_at >= 0)
    b_k = load_rows(
        p_rows + i_sequence * s_sequence, p_table + i_sequence * s_table, p_codes, p_scales,
        s_head, s_slot, s_token, slots, i_head, tl.where(m_a, b_at, 0), m_a, o_d, D, KIND, SHIFT,
    )  # fmt: skip
    p = p_q + i_sequence * s_q_sequence + (i_head * G + o_g)[:, None] * s_q_head + o_d[None, :]
    b_q = tl.load(p, mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)  # [B_G, B_D]
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)  # [B_G, B_A]
    if SHARED:
        b_s = tl.broadcast_to(tl.sum(b_s, 0)[None, :], [B_G, B_A])  # rows that are no heads are 0
    b_s = tl.where(m_a[None, :], b_s, float("-inf"))
    b_i = tl.broadcast_to(o_a[None, :], [B_G, B_A])
    heads = tl.num_programs(1) * G
    if i_block == 0:
        tl.store(p_written + i_sequence * heads + i_head * G + o_g, tl.zeros([B_G], tl.int32), mask=o_g < G)
    row = (i_sequence * heads + i_head * G + o_g) * tl.num_programs(0) + i_block
    for j in tl.static_range(SPANS):
        best, number = best_of(b_s, b_i)
        b_s = tl.where(b_i == number[:, None], float("-inf"), b_s)
        some = (best > float("-inf")) & (number < steps)
        anchor = n - tl.load(p_steps + number, mask=some, other=0)
        tl.store(p_best + row * SPANS + j, tl.where(some, best, float("-inf")), mask=o_g < G)
        tl.store(p_anchor + row * SPANS + j, tl.where(some, anchor, -1), mask=o_g < G)


@triton.jit
def _keep_better(b_s, b_i, b_best, b_number):
    """Put scores into a column's sorted list at one place; return the list's entry and what it displaces."""
    better = b_s > b_best
    kept, number = tl.where(better, b_s, b_best), tl.where(better, b_i, b_number)
    return kept, number, tl.where(better, b_best, b_s), tl.where(better, b_number, b_i)


@triton.jit
def _cut(lo_j, hi_j, lo_k, hi_k, FIRST: tl.constexpr):
    """Return where span j begins once the keys that it shares with k, which begins earlier, are k's."""
    before = (lo_k < lo_j) | ((lo_k == lo_j) & FIRST)
    return tl.where((lo_k <= hi_k) & before, tl.maximum(lo_j, hi_k + 1), lo_j)


@triton.jit
def search_kernel(
    p_q, p_rows, p_table, p_codes, p_scales, p_steps, p_counts, p_score, p_lo, p_hi, p_key, p_anchor,
    s_q_sequence, s_q_head, s_q_token, s_sequence, s_head, s_slot, s_token, s_table, slots,
    first, window, sinks, stride, band,
    G: tl.constexpr, B_G: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr, B_A: tl.constexpr,
    SPANS: tl.constexpr, BACKWARD: tl.constexpr, FORWARD: tl.constexpr, SPAN_POWER: tl.constexpr, JOINT: tl.constexpr,
    KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr, ANCHORS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Find the spans of one query for the heads of one KV head.

    Scores, first and last keys `[B, Hkv, G, T, SPANS]`, anchors (ANCHORS), and keys that sort these rows: by KV head,
    then by bands, then by where the span begins. A band is neighbouring queries, whose spans are nearly as long as one
    another. Rows that another span cut short are a band of their own, the first: they are few, their tiles wide, and
    what takes longest must not begin last. (Rows that the context's ends cut short stay with their neighbours: few
    tiles of theirs would reach from one end to the other.) Empty rows come last. Every second band runs backwards: a
    tile with rows of two bands would otherwise do so too.
    """
    i_t, i_head, i_sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    count, heads = tl.num_programs(0), tl.num_programs(1)
    n = first + i_t + 1
    anchors = tl.load(p_counts + i_t)
    o_g, o_d = tl.arange(0, B_G), tl.arange(0, B_D)
    p = p_q + i_sequence * s_q_sequence + (i_head * G + o_g)[:, None] * s_q_head + i_t.to(tl.int64) * s_q_token
    b_q = tl.load(p + o_d[None, :], mask=(o_g < G)[:, None] & (o_d < D)[None, :], other=0.0)  # [B_G, B_D]
    p_rows += i_sequence * s_sequence
    p_table += i_sequence * s_table
    # Every column keeps the best of its anchors in order, so that no block needs a search across columns.
    b_best0 = tl.full([B_G, B_A], float("-inf"), tl.float32)
    b_best1, b_best2, b_best3 = b_best0, b_best0, b_best0
    b_number0 = tl.full([B_G, B_A], 2147483647, tl.int32)
    b_number1, b_number2, b_number3 = b_number0, b_number0, b_number0
    for start in tl.range(0, anchors, B_A):
        o_a = start + tl.arange(0, B_A)
        m_a = o_a < anchors
        b_at = n - tl.load(p_steps + o_a, mask=m_a, other=0)
        b_k = load_rows(
            p_rows, p_table, p_codes, p_scales, s_head, s_slot, s_token, slots,
            i_head, tl.where(m_a, b_at, 0), m_a, o_d, D, KIND, SHIFT,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)
        if SHARED:
            b_s = tl.broadcast_to(tl.sum(b_s, 0)[None, :], [B_G, B_A])
        b_s = tl.where(m_a[None, :], b_s, float("-inf"))
        b_i = tl.broadcast_to(o_a[None, :], [B_G, B_A])
        b_best0, b_number0, b_s, b_i = _keep_better(b_s, b_i, b_best0, b_number0)
        if SPANS > 1:
            b_best1, b_number1, b_s, b_i = _keep_better(b_s, b_i, b_best1, b_number1)
        if SPANS > 2:
            b_best2, b_number2, b_s, b_i = _keep_better(b_s, b_i, b_best2, b_number2)
        if SPANS > 3:
            b_best3, b_number3, b_s, b_i = _keep_better(b_s, b_i, b_best3, b_number3)

    reach_back, reach_on = reach_of(n, BACKWARD, SPAN_POWER), reach_of(n, FORWARD, SPAN_POWER)
    last = n - 1 - window
    nothing = tl.zeros([B_G], tl.int32)
    lo0, lo1, lo2, lo3 = nothing, nothing, nothing, nothing
    hi0, hi1, hi2, hi3 = nothing - 1, nothing - 1, nothing - 1, nothing - 1
    row = ((i_sequence * heads + i_head) * G + o_g) * count + i_t
    for j in tl.static_range(SPANS):
        best, number = best_of(b_best0, b_number0)
        # The column that held it brings up its next.
        taken = (b_number0 == number[:, None]) & (b_best0 == best[:, None])
        b_best0, b_number0 = tl.where(taken, b_best1, b_best0), tl.where(taken, b_number1, b_number0)
        b_best1, b_number1 = tl.where(taken, b_best2, b_best1), tl.where(taken, b_number2, b_number1)
        b_best2, b_number2 = tl.where(taken, b_best3, b_best2), tl.where(taken, b_number3, b_number2)
        b_best3 = tl.where(taken, float("-inf"), b_best3)
        some = (best > float("-inf")) & (number < anchors)
        anchor = n - tl.load(p_steps + number, mask=some, other=0)
        lo = tl.where(some, tl.maximum(tl.maximum(anchor - reach_back, 0), sinks), 0)
        hi = tl.where(some, tl.minimum(anchor + reach_on, last), -1)
        tl.store(p_score + row * SPANS + j, tl.where(some, best, float("-inf")), mask=o_g < G)
        if ANCHORS:
            tl.store(p_anchor + row * SPANS + j, tl.where(some, anchor, 0), mask=o_g < G)
        if j == 0:
            lo0, hi0 = lo, hi
        elif j == 1:
            lo1, hi1 = lo, hi
        elif j == 2:
            lo2, hi2 = lo, hi
        else:
            lo3, hi3 = lo, hi

    full = reach_back + reach_on + 1
    for j in tl.static_range(SPANS):
        if j == 0:
            lo, hi = lo0, hi0
        elif j == 1:
            lo, hi = lo1, hi1
        elif j == 2:
            lo, hi = lo2, hi2
        else:
            lo, hi = lo3, hi3
        cut = lo
        if JOINT:
            if j != 0:
                cut = tl.maximum(cut, _cut(lo, hi, lo0, hi0, j > 0))
            if j != 1 and SPANS > 1:
                cut = tl.maximum(cut, _cut(lo, hi, lo1, hi1, j > 1))
            if j != 2 and SPANS > 2:
                cut = tl.maximum(cut, _cut(lo, hi, lo2, hi2, j > 2))
            if j != 3 and SPANS > 3:
                cut = tl.maximum(cut, _cut(lo, hi, lo3, hi3, j > 3))
        bands = tl.cdiv(count, band)
        # Farther back cut rows lie so far apart that a tile of them would read eight spans and more: they stay.
        near = n - lo <= count * (G * SPANS * (SPANS - 1) // 4)
        short = (cut > lo) & ((hi - cut) * 4 < full * 3) & near
        i_band = tl.where(cut > hi, bands + 1, tl.where(short, 0, i_t // band + 1))
        place = tl.minimum(cut, stride - 1)
        place = tl.where(i_band % 2 == 1, stride - 1 - place, place)
        tl.store(p_lo + row * SPANS + j, cut, mask=o_g < G)
        tl.store(p_hi + row * SPANS + j, hi, mask=o_g < G)
        key = ((i_sequence * heads + i_head) * (bands + 2) + i_band) * stride + place
        tl.store(p_key + row * SPANS + j, key.to(p_key.dtype.element_ty), mask=o_g < G)
