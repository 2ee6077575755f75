"""One decode step of superlinear attention as two or three Triton kernels, for sequences of different lengths.

1. `search_newest_kernel`: the best anchors in every block of anchors.
2. `parts_kernel`: a program finds the best anchors of its query head over all blocks, and attends to a piece of one
   span; other programs attend, for all heads of a KV head, to a piece of what is near (sinks and window). Each writes
   an output and its log-sum-exp.
3. `merge_kernel`: one softmax over all pieces, or the gate of the spans. Or no kernel: of the programs that write a
   head's pieces the last to finish merges them (`Cut.last`). Each counts itself once its piece is written; none waits.

Splitting spans over programs is what keeps every channel of the memory busy (split-K, as flash-decoding does).
No step waits for the host: how many programs run depends on what the page tables could hold, and those that find
nothing to do end at once. So a step can be captured in a CUDA graph and replayed as the sequences grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.held import MIXED, Held
from longspan.kernels.held_triton import load_rows
from longspan.kernels.superlinear.search import Search, Turn
from longspan.kernels.superlinear.triton_search import reach_of, search_newest_kernel
from longspan.kernels.tiles import hopper, processors

_LOG2E = 1.4426950408889634
_NEVER = 2**31 - 1
_MERGED = 64 * 128
"""Numbers that one program merges at once: 64 of each thread's registers, fewer than a piece of a span takes."""


@dataclass(frozen=True)
class Cut:
    """How a decode step is cut into programs and launches."""

    split: int
    """Keys of a span that one program reads."""
    keys: int
    """Keys that a program reads at once."""
    anchors: int = 32
    """Anchors that a program scores."""
    rest: int = 0
    """Keys over whole pieces that the last piece of a span reads as well: no program of their own."""
    stages: int = 1
    """Blocks of keys of a piece that are on their way at once."""
    last: bool = False
    """Whether the last program of a head merges its pieces, where they are few; else a kernel does."""
    chained: bool = False
    """Whether the search starts early, too, and waits for all that came before (where kernels start early at all)."""

    def pieces(self, longest: int) -> int:
        """Return into how many pieces the longest span is cut."""
        return max(1, -(-(longest - self.rest) // self.split))


def cut_for(dtype: torch.dtype, kind: int, dim: int, longest: int, rows: int = 0, slots: int = 396) -> Cut:
    """Return the cut for a type, what holds it, and a head size (as Hopper likes it).

    Args:
        dtype: of keys and values.
        kind: what holds them.
        dim: head size.
        longest: keys of the longest span.
        rows: spans that are read.
        slots: programs that run at the same time: three a multiprocessor, of an H100 or H200 here.
    """
    keys = 64 if dim > 128 or dtype == torch.float32 or kind == MIXED else 128
    split = 256 if longest < 1500 else 512 if longest < 3000 else 1024
    # What lies over whole pieces by a few keys is a piece of its own, which ends at once.
    reach = max(1, longest - 64)
    pieces = triton.cdiv(reach, split)
    if rows * pieces > 2 * slots:
        # Programs run in rounds: 13 pieces of each of 96 spans take four, 12 take three.
        fewer = range(max(1, pieces * 3 // 4), pieces + 1)
        pieces = min(fewer, key=lambda count: triton.cdiv(rows * count, slots) * triton.cdiv(reach, count))
        split = triton.cdiv(triton.cdiv(reach, pieces), 64) * 64
    return Cut(split, keys)


@triton.jit
def _rotated(p_q, o_row, o_d, m_q, p_freq, position, ROTARY: tl.constexpr, D: tl.constexpr):
    """Load queries, and rotate their first ROTARY channels to a position: channel i is paired with i + ROTARY / 2.

    Angles are float64 (at 10M a float32 angle would be off by half a radian) and taken to one turn.
    """
    b_q = tl.load(p_q + o_row + o_d, mask=m_q, other=0.0)
    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        o_freq = tl.where(o_d < half, o_d, o_d - half)
        b_turns = position.to(tl.float64) * tl.load(p_freq + o_freq, mask=o_d < ROTARY, other=0.0)
        b_angle = ((b_turns - tl.floor(b_turns)) * 6.283185307179586).to(tl.float32)
        o_other = tl.where(o_d < half, o_d + half, tl.where(o_d < ROTARY, o_d - half, o_d))
        b_other = tl.load(p_q + o_row + o_other, mask=m_q, other=0.0).to(tl.float32)
        b_other = tl.where(o_d < half, -b_other, b_other)
        b_turned = b_q.to(tl.float32) * tl.cos(b_angle) + b_other * tl.sin(b_angle)
        b_q = tl.where(o_d < ROTARY, b_turned, b_q.to(tl.float32)).to(b_q.dtype)
    return b_q


@triton.jit
def _group_piece(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales, p_out, p_lse,
    s_q_head, s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
    p_freq, i_head, i_part, o_n, m_n, position, scale,
    ROTARY: tl.constexpr, G: tl.constexpr, B_G: tl.constexpr,
    D: tl.constexpr, B_D: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr, PARTS: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the keys o_n `[B_N]`, as far as m_n says, with all query heads of a KV head at once."""
    o_g, o_d, o_dv = tl.arange(0, B_G), tl.arange(0, B_D), tl.arange(0, B_DV)
    b_k = load_rows(
        p_k, p_k_table, p_k_codes, p_k_scales, s_k_head, s_k_slot, s_k_token, k_slots,
        i_head, o_n, m_n, o_d, D, K_KIND, SHIFT,
    )  # fmt: skip
    b_v = load_rows(
        p_v, p_v_table, p_v_codes, p_v_scales, s_v_head, s_v_slot, s_v_token, v_slots,
        i_head, o_n, m_n, o_dv, DV, V_KIND, SHIFT,
    )  # fmt: skip
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_q = _rotated(p_q, (i_head * G + o_g)[:, None] * s_q_head, o_d[None, :], m_q, p_freq, position, ROTARY, D)
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION) * scale  # [B_G, B_N], in base 2
    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_p = tl.exp2(b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[:, None])
    b_sum = tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    row = (i_head * G + o_g) * PARTS + i_part
    tl.store(p_lse + row, b_max + tl.log2(b_sum), mask=o_g < G)
    tl.store(p_out + row[:, None] * DV + o_dv[None, :], b_o, mask=(o_g < G)[:, None] & (o_dv < DV)[None, :])


@triton.jit
def _near_keys(n, i_piece, window, sinks, trained, B_N: tl.constexpr):
    """Return the keys of a piece of what is near, which of them there are, and from where the query sees them."""
    begin = tl.maximum(n - window, 0)
    first = tl.minimum(sinks, begin)  # sinks that the window does not hold: pieces of their own, before the window's
    pieces = tl.cdiv(sinks, B_N)
    o_n = i_piece * B_N + tl.arange(0, B_N)
    m_n = o_n < first
    position = n - 1
    if i_piece >= pieces:
        o_n += begin - pieces * B_N
        m_n = o_n < n
    elif n > trained:
        position = window + first - 1  # as if they stood directly before the window
    return o_n, m_n, position


@triton.jit
def _next_best(b_s, b_at):
    """Return the best score of a list, its anchor (of equals the newer), and the list without it."""
    best = tl.max(b_s, 0)
    anchor = tl.max(tl.where(b_s == best, b_at, -1), 0)
    return best, anchor, tl.where((b_s == best) & (b_at == anchor), float("-inf"), b_s)


@triton.jit
def _span_of(
    p_best, p_anchor, n, candidates, mine, window, sinks,
    B_C: tl.constexpr, SPANS: tl.constexpr, BACKWARD: tl.constexpr, FORWARD: tl.constexpr, SPAN_POWER: tl.constexpr,
    JOINT: tl.constexpr,
):  # fmt: skip
    """Return score, first and last key of one of a query head's spans: the best of the best of every block."""
    o_c = tl.arange(0, B_C)
    b_s = tl.load(p_best + o_c, mask=o_c < candidates, other=float("-inf"))
    b_at = tl.load(p_anchor + o_c, mask=o_c < candidates, other=-1)
    reach_back, reach_on = reach_of(n, BACKWARD, SPAN_POWER), reach_of(n, FORWARD, SPAN_POWER)
    last = n - 1 - window
    score = tl.full([], float("-inf"), tl.float32)
    lo, hi = n * 0, n * 0 - 1
    b_left = b_s
    for j in tl.static_range(SPANS):
        best, anchor, b_left = _next_best(b_left, b_at)
        here = (j == mine) & (best > float("-inf"))
        score = tl.where(here, best, score)
        lo = tl.where(here, tl.maximum(tl.maximum(anchor - reach_back, 0), sinks), lo)
        hi = tl.where(here, tl.minimum(anchor + reach_on, last), hi)
    start = lo
    if JOINT:
        b_left = b_s
        for j in tl.static_range(SPANS):
            best, anchor, b_left = _next_best(b_left, b_at)
            lo_j = tl.maximum(tl.maximum(anchor - reach_back, 0), sinks)
            hi_j = tl.minimum(anchor + reach_on, last)
            # Keys that two spans share belong to the one that begins earlier.
            before = (best > float("-inf")) & (lo_j <= hi_j) & ((lo_j < lo) | ((lo_j == lo) & (j < mine)))
            start = tl.where(before, tl.maximum(start, hi_j + 1), start)
    return score, start, hi


@triton.jit
def _span_piece(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales, p_out, p_lse,
    s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
    p_freq, i_head, start, end, position, scale,
    ROTARY: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr, B_N: tl.constexpr,
    STAGES: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Attend with one query head to the keys `start .. end - 1`."""
    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    b_q = _rotated(p_q, 0, o_d, o_d < D, p_freq, position, ROTARY, D).to(tl.float32) * scale  # [B_D]
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    b_o = tl.zeros([B_DV], tl.float32)
    for begin in tl.range(start, end, B_N, num_stages=STAGES):
        o_n = begin + tl.arange(0, B_N)
        m_n = o_n < end
        b_k = load_rows(
            p_k, p_k_table, p_k_codes, p_k_scales, s_k_head, s_k_slot, s_k_token, k_slots,
            i_head, o_n, m_n, o_d, D, K_KIND, SHIFT,
        )  # fmt: skip
        b_v = load_rows(
            p_v, p_v_table, p_v_codes, p_v_scales, s_v_head, s_v_slot, s_v_token, v_slots,
            i_head, o_n, m_n, o_dv, DV, V_KIND, SHIFT,
        )  # fmt: skip
        b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)  # [B_N], in base 2
        b_s = tl.where(m_n, b_s, float("-inf"))
        new = tl.maximum(top, tl.max(b_s, 0))
        b_p = tl.exp2(b_s - new)
        keep = tl.exp2(top - new)
        total = total * keep + tl.sum(b_p, 0)
        b_o = b_o * keep + tl.sum(b_p[:, None] * b_v.to(tl.float32), 0)
        top = new
    tl.store(p_lse, top + tl.log2(total))
    tl.store(p_out + o_dv, b_o / total, mask=o_dv < DV)


@triton.jit
def _merged(
    p_parts, p_lse, p_score, o_dv,
    NEAR: tl.constexpr, PIECES: tl.constexpr, SPANS: tl.constexpr, JOINT: tl.constexpr,
    DV: tl.constexpr, B_DV: tl.constexpr, B_P: tl.constexpr, B_CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the channels o_dv `[B_DV]` of what the pieces of one query head give together."""
    parts: tl.constexpr = NEAR + SPANS * PIECES
    o_p = tl.arange(0, B_P)
    b_l = tl.load(p_lse + o_p, mask=o_p < parts, other=float("-inf"))
    top = tl.max(b_l, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_w = tl.exp2(b_l - top)  # [B_P], how much each part weighs
    factor_near = 1.0 / tl.sum(b_w, 0)
    b_factor = tl.zeros([B_P], tl.float32) + factor_near
    if not JOINT:
        # softmax over span j and what is near jointly, weighed by the gate: what each part is multiplied by
        near = tl.sum(tl.where(o_p < NEAR, b_w, 0.0), 0)
        best = tl.full([], float("-inf"), tl.float32)
        for j in tl.static_range(SPANS):
            best = tl.maximum(best, tl.load(p_score + j))
        if best > float("-inf"):
            gates, shared = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
            for j in tl.static_range(SPANS):
                gate = tl.exp(tl.load(p_score + j) - best)
                inside = (o_p >= NEAR + j * PIECES) & (o_p < NEAR + (j + 1) * PIECES)
                part = gate / (near + tl.sum(tl.where(inside, b_w, 0.0), 0))
                b_factor = tl.where(inside, part, b_factor)
                gates += gate
                shared += part
            b_factor = tl.where(o_p < NEAR, shared, b_factor) / gates
    b_w = b_w * b_factor
    if B_P == B_CHUNK:
        # Parts without keys were not written; NaN is unequal to 0.
        p = p_parts + o_p[:, None] * DV + o_dv[None, :]
        b_x = tl.load(p, mask=((o_p < parts) & (b_w != 0.0))[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_o = tl.sum(b_w[:, None] * b_x, 0)
    else:
        b_o = tl.zeros([B_DV], tl.float32)
        for start in tl.static_range(0, B_P, B_CHUNK):
            o_c = tl.arange(0, B_CHUNK)
            chosen = o_p[:, None] == start + o_c[None, :]
            b_c = tl.sum(tl.where(chosen, b_w[:, None], 0.0), 0)
            p = p_parts + (start + o_c)[:, None] * DV + o_dv[None, :]
            b_x = tl.load(p, mask=((start + o_c < parts) & (b_c != 0.0))[:, None] & (o_dv < DV)[None, :], other=0.0)
            b_o += tl.sum(b_c[:, None] * b_x, 0)
    return b_o


@triton.jit
def _merge_if_last(
    p_written, p_parts, p_lse, p_score, p_out, s_out_head,
    head, EACH: tl.constexpr, B_E: tl.constexpr,
    NEAR: tl.constexpr, PIECES: tl.constexpr, SPANS: tl.constexpr, JOINT: tl.constexpr,
    DV: tl.constexpr, B_DV: tl.constexpr, B_P: tl.constexpr,
):  # fmt: skip
    """Count a piece of the EACH query heads from `head` on as written, and merge those heads whose last it was.

    All of this program's stores come before its count (the barrier, and release), all of the others' before the merge
    that reads them (acquire, and the barrier).
    """
    parts: tl.constexpr = NEAR + SPANS * PIECES
    o_e, o_dv = tl.arange(0, B_E), tl.arange(0, B_DV)
    tl.debug_barrier()
    b_before = tl.atomic_add(p_written + head + o_e, 1, mask=o_e < EACH, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    for e in range(EACH):
        if tl.sum(tl.where(o_e == e, b_before, 0), 0) == parts - 1:
            row = head + e
            b_o = _merged(
                p_parts + row * parts * DV, p_lse + row * parts, p_score + row * SPANS, o_dv,
                NEAR, PIECES, SPANS, JOINT, DV, B_DV, B_P, B_P,
            )  # fmt: skip
            tl.store(p_out + row * s_out_head + o_dv, b_o.to(p_out.dtype.element_ty), mask=o_dv < DV)


@triton.jit
def parts_kernel(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lengths, p_best, p_anchor, p_freq, p_out, p_lse, p_score, p_written, p_merged,
    s_q_sequence, s_q_head, s_merged_sequence, s_merged_head,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    candidates, window, sinks, trained, scale,
    ROTARY: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, B_G: tl.constexpr,
    D: tl.constexpr, B_D: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr,
    NEAR: tl.constexpr, PIECES: tl.constexpr, SPLIT: tl.constexpr, B_N: tl.constexpr, STAGES: tl.constexpr,
    B_C: tl.constexpr, B_P: tl.constexpr, LAST: tl.constexpr,
    SPANS: tl.constexpr, BACKWARD: tl.constexpr, FORWARD: tl.constexpr, SPAN_POWER: tl.constexpr, JOINT: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend to one piece: outputs `[B, Hq, NEAR + SPANS * PIECES, Dv]`, log-sum-exps in base 2, search scores.

    With LAST, the last program of a query head merges what all have written, `[B, Hq, Dv]`.
    """
    if EARLY:
        gdc_launch_dependents()
    i_part, i_sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_lengths + i_sequence).to(tl.int32)
    kv_heads: tl.constexpr = HEADS // G
    parts: tl.constexpr = NEAR + SPANS * PIECES
    p_q += i_sequence * s_q_sequence
    p_k += i_sequence * s_k_sequence
    p_k_table += i_sequence * s_k_table
    p_v += i_sequence * s_v_sequence
    p_v_table += i_sequence * s_v_table
    p_out += i_sequence * HEADS * parts * DV
    p_lse += i_sequence * HEADS * parts
    p_score += i_sequence * HEADS * SPANS
    p_written += i_sequence * HEADS
    p_merged += i_sequence * s_merged_sequence
    if i_part < NEAR * kv_heads:
        i_head = (i_part % kv_heads).to(tl.int64)
        o_n, m_n, position = _near_keys(n, i_part // kv_heads, window, sinks, trained, B_N)
        _group_piece(
            p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales, p_out, p_lse,
            s_q_head, s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
            p_freq, i_head, i_part // kv_heads, o_n, m_n, position, scale,
            ROTARY, G, B_G, D, B_D, DV, B_DV, parts, K_KIND, V_KIND, SHIFT, PRECISION,
        )  # fmt: skip
        if LAST:
            if EARLY:
                gdc_wait()  # for the search, which begins the counts
            _merge_if_last(
                p_written, p_out, p_lse, p_score, p_merged, s_merged_head, i_head * G, G, B_G,
                NEAR, PIECES, SPANS, JOINT, DV, B_DV, B_P,
            )  # fmt: skip
    elif SPANS > 0:
        # Who chooses spans: query heads, or KV heads for their group, of which the first head then stands for all.
        choosers: tl.constexpr = kv_heads if SHARED else HEADS
        each: tl.constexpr = HEADS // choosers
        i_rest = i_part - NEAR * kv_heads
        i_piece, i_row = i_rest // (choosers * SPANS), i_rest % (choosers * SPANS)
        mine, head = i_row % SPANS, (i_row // SPANS * each).to(tl.int64)
        row = i_sequence * HEADS + head
        if EARLY:
            gdc_wait()  # for the search; what is near does not need it
        score, start, hi = _span_of(
            p_best + row * candidates, p_anchor + row * candidates, n, candidates, mine, window, sinks,
            B_C, SPANS, BACKWARD, FORWARD, SPAN_POWER, JOINT,
        )  # fmt: skip
        o_e = tl.arange(0, B_G)  # the heads that it chose for
        if i_piece == 0:
            tl.store(p_score + (head + o_e) * SPANS + mine, tl.zeros([B_G], tl.float32) + score, mask=o_e < each)
        start += i_piece * SPLIT
        end = tl.where(i_piece == PIECES - 1, hi + 1, tl.minimum(start + SPLIT, hi + 1))
        i_span = NEAR + mine * PIECES + i_piece
        position = tl.where(n > trained, window + hi, n - 1)
        if start > hi:
            nothing = tl.full([B_G], float("-inf"), tl.float32)
            tl.store(p_lse + (head + o_e) * parts + i_span, nothing, mask=o_e < each)
        elif SHARED:
            o_n = start + tl.arange(0, B_N)
            _group_piece(
                p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales, p_out, p_lse,
                s_q_head, s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
                p_freq, head // G, i_span, o_n, o_n <= hi, position, scale,
                ROTARY, G, B_G, D, B_D, DV, B_DV, parts, K_KIND, V_KIND, SHIFT, PRECISION,
            )  # fmt: skip
        else:
            part = head * parts + i_span
            _span_piece(
                p_q + head * s_q_head, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
                p_out + part * DV, p_lse + part,
                s_k_head, s_k_slot, s_k_token, k_slots, s_v_head, s_v_slot, s_v_token, v_slots,
                p_freq, head // G, start, end, position, scale,
                ROTARY, D, B_D, DV, B_DV, B_N, STAGES, K_KIND, V_KIND, SHIFT,
            )  # fmt: skip
        if LAST:
            _merge_if_last(
                p_written, p_out, p_lse, p_score, p_merged, s_merged_head, head, each, B_G,
                NEAR, PIECES, SPANS, JOINT, DV, B_DV, B_P,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    p_parts, p_lse, p_score, p_out, s_out_sequence, s_out_head,
    NEAR: tl.constexpr, PIECES: tl.constexpr, SPANS: tl.constexpr, JOINT: tl.constexpr,
    DV: tl.constexpr, B_DV: tl.constexpr, B_P: tl.constexpr, B_CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the pieces of one query head, B_DV channels a program."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    i_head, i_channels, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts: tl.constexpr = NEAR + SPANS * PIECES
    row = i_sequence * tl.num_programs(0) + i_head
    o_dv = i_channels * B_DV + tl.arange(0, B_DV)
    b_o = _merged(
        p_parts + row * parts * DV, p_lse + row * parts, p_score + row * SPANS, o_dv,
        NEAR, PIECES, SPANS, JOINT, DV, B_DV, B_P, B_CHUNK,
    )  # fmt: skip
    p = p_out + i_sequence * s_out_sequence + i_head.to(tl.int64) * s_out_head + o_dv
    tl.store(p, b_o.to(p_out.dtype.element_ty), mask=o_dv < DV)


def decode(
    q: Tensor, k: Held, v: Held, lengths: Tensor, search: Search, *, scale: float,
    routing_query: Tensor | None = None, search_keys: Held | None = None, turn: Turn | None = None,
    out: Tensor | None = None, cut: Cut | None = None, early: bool | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the newest token of every sequence; see `reference.decode`, and beyond it:

    Args:
        q: as there, and so on.
        k: as there.
        v: as there.
        lengths: as there; on the device.
        search: as there.
        scale: as there.
        routing_query: as there.
        search_keys: as there.
        turn: as there.
        out: where the result goes, `[B, Hq, Dv]`; None: a new tensor of q's type.
        cut: how work is cut into programs; None: as `cut_for` says.
        early: whether a kernel's programs may start before the last of the kernel before it have ended, and wait for
            them where they need to (programmatic dependent launch); None: on Hopper.
    """
    sequences, heads, dim = q.shape
    group, value_dim = heads // k.heads, v.dim
    routing = q if routing_query is None else routing_query
    searched = k if search_keys is None else search_keys
    assert q.stride(-1) == routing.stride(-1) == 1, "channels lie together"
    capacity = k.capacity
    steps = search.steps(capacity, q.device)
    spans = search.spans if steps.numel() else 0
    longest = search.longest(capacity) if spans else 0
    early = hopper(q.device) if early is None else early
    read = sequences * (k.heads if search.share == "group" else heads) * spans
    cut = cut or cut_for(q.dtype, v.kind, max(dim, value_dim), longest, read, 3 * processors(q.device))
    dims = {"D": dim, "B_D": max(16, triton.next_power_of_2(dim))}
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    block_g = max(16, triton.next_power_of_2(group))
    joint, shared = search.gate == "joint", search.share == "group"

    blocks = max(1, triton.cdiv(steps.numel(), cut.anchors))
    # A group reads a piece with all its heads, as much as a program reads at once; a head alone goes on.
    split, choosers = (cut.keys, k.heads) if shared else (cut.split, heads)
    pieces = max(1, triton.cdiv(longest, split)) if shared else cut.pieces(longest)
    near = triton.cdiv(search.sinks, cut.keys) + triton.cdiv(min(capacity, search.window), cut.keys)
    parts = near + spans * pieces
    block_p, block_dv = triton.next_power_of_2(parts), max(16, triton.next_power_of_2(value_dim))
    last = cut.last and spans > 0 and block_p * block_dv <= _MERGED

    best = torch.empty(sequences, heads, blocks, max(1, spans), dtype=torch.float32, device=q.device)
    anchor = torch.empty(best.shape, dtype=torch.int32, device=q.device)
    written = torch.empty(sequences, heads, dtype=torch.int32, device=q.device)
    if spans:
        rows, table, codes, scales, *strides = searched.arguments()
        search_newest_kernel[(blocks, k.heads, sequences)](
            routing, rows, table, codes, scales, lengths, steps, best, anchor, written,
            routing.stride(0), routing.stride(1), *strides, steps.numel(),
            G=group, B_G=block_g, **dims, B_A=cut.anchors, SPANS=spans,
            KIND=searched.kind, SHIFT=searched.shift, PRECISION=precision, SHARED=shared, EARLY=early,
            num_warps=1, **({"launch_pdl": True} if early and cut.chained else {}),
        )  # fmt: skip

    part_out = torch.empty(sequences, heads, parts, value_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(sequences, heads, parts, dtype=torch.float32, device=q.device)
    score = torch.empty(sequences, heads, max(1, spans), dtype=torch.float32, device=q.device)
    if out is None:
        out = torch.empty(sequences, heads, value_dim, dtype=q.dtype, device=q.device)
    k_rows, k_table, k_codes, k_scales, *k_strides = k.arguments()
    v_rows, v_table, v_codes, v_scales, *v_strides = v.arguments()
    parts_kernel[(near * k.heads + choosers * spans * pieces, sequences)](
        q, k_rows, k_table, k_codes, k_scales, v_rows, v_table, v_codes, v_scales,
        lengths, best, anchor, part_lse if turn is None else turn.per_token, part_out, part_lse, score, written, out,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *k_strides, *v_strides,
        blocks * max(1, spans), search.window, search.sinks, _NEVER if turn is None else turn.trained, scale * _LOG2E,
        ROTARY=0 if turn is None else 2 * turn.per_token.numel(), HEADS=heads, G=group, B_G=block_g,
        **dims, DV=value_dim, B_DV=block_dv,
        NEAR=near, PIECES=pieces, SPLIT=split, B_N=cut.keys, STAGES=cut.stages,
        B_C=triton.next_power_of_2(blocks * max(1, spans)), B_P=block_p, LAST=last,
        SPANS=spans, BACKWARD=search.backward, FORWARD=search.forward, SPAN_POWER=search.span_power, JOINT=joint,
        K_KIND=k.kind, V_KIND=v.kind, SHIFT=v.shift, PRECISION=precision,
        SHARED=shared, EARLY=early, num_warps=4, num_stages=1, **({"launch_pdl": True} if early and spans else {}),
    )  # fmt: skip

    if not last:
        channels = min(32, block_dv)
        merge_kernel[(heads, triton.cdiv(value_dim, channels), sequences)](
            part_out, part_lse, score, out, out.stride(0), out.stride(1),
            NEAR=near, PIECES=pieces, SPANS=spans, JOINT=joint,
            DV=value_dim, B_DV=channels, B_P=block_p, B_CHUNK=min(256, block_p),
            EARLY=early, num_warps=4, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
