"""Span attention for Hopper with warps that have parts of their own, in Triton's lower language, Gluon.

The same tile of sorted rows as in `triton_kernels.py`. One warp brings blocks of keys and values by the copy engine;
two groups of four warps take half of the tile's rows each. A group issues the next block's scores and the last block's
outputs together, and makes weights of scores while the tensor cores are busy, also with the other group's products:
FlashAttention-3's schedule (arXiv 2407.08608, section 3). A tile whose outputs are not all finite is only marked here,
and done anew by the other kernel, which takes care of values that are not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.kernels.held import PAGE, PAGES, Held

ROWS = 128
"""Rows of a tile: 64 for each group of warps."""

# Another name from Triton 3.9 on.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _block(i, left, masked, start, edge, middle, whole, turn, BLOCK_N: gl.constexpr):
    """Return the first key of a tile's i-th block: those at its two ends first, then the whole ones from `turn` on."""
    j = i - masked
    j = gl.where(j + turn < whole, j + turn, j + turn - whole)
    n = gl.where(i < left, start + i * BLOCK_N, edge + (i - left) * BLOCK_N)
    return gl.where(i < masked, n, middle + j * BLOCK_N)


@gluon.jit
def _rows(p_k_table, p_v_table, k_first, v_first, n, BLOCK_N: gl.constexpr):
    """Return where the keys and values of a block lie that begins with key n: a block of 64 keys is a page."""
    if BLOCK_N == 64:
        k_row = k_first + gl.load(p_k_table + n // 64).to(gl.int32) * 64
        v_row = v_first + gl.load(p_v_table + n // 64).to(gl.int32) * 64
    else:
        k_row, v_row = k_first + n, v_first + n
    return k_row, v_row


@gluon.jit
def _bring(
    k_rows, v_rows, p_k_table, p_v_table, k_first, v_first, s_k, s_v, k_full, k_free, v_full, v_free,
    left, masked, start, edge, middle, whole, turn,
):  # fmt: skip
    """Copy every block of keys and values into the next free place."""
    STAGES: gl.constexpr = s_k.shape[0]
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    total = masked + whole
    k_row, v_row = k_first, v_first
    if total > 0:
        n = _block(0, left, masked, start, edge, middle, whole, turn, BLOCK_N)
        k_row, v_row = _rows(p_k_table, p_v_table, k_first, v_first, n, BLOCK_N)
    for i in range(total):
        place, phase = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(k_free.index(place), phase ^ 1)
        mbarrier.expect(k_full.index(place), BLOCK_N * D * 2)
        _copy(k_rows, [k_row, 0], k_full.index(place), s_k.index(place))
        mbarrier.wait(v_free.index(place), phase ^ 1)
        mbarrier.expect(v_full.index(place), BLOCK_N * D * 2)
        _copy(v_rows, [v_row, 0], v_full.index(place), s_v.index(place))
        # A page is looked up while the block before it is still on its way.
        n = _block(gl.minimum(i + 1, total - 1), left, masked, start, edge, middle, whole, turn, BLOCK_N)
        k_row, v_row = _rows(p_k_table, p_v_table, k_first, v_first, n, BLOCK_N)


@gluon.jit
def _weights(b_s, b_max, b_sum, b_lo, b_hi, n, is_masked, scale, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the weights of a block by its scores, the new maximum and sum, and what earlier sums are multiplied by."""
    if is_masked:
        o_n = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        m_read = (o_n[None, :] >= b_lo[:, None]) & (o_n[None, :] <= b_hi[:, None])
        b_s = gl.where(m_read, b_s, float("-inf"))
    # NaN among the scores is lost in a maximum, not in the sum of the weights.
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale)
    b_base = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale - b_base[:, None])
    b_keep = gl.exp2(b_max - b_base)
    return b_p, b_new, b_sum * b_keep + gl.sum(b_p, 1), b_keep


@gluon.jit
def _attend(
    s_q, s_k, s_v, k_full, k_free, v_full, v_free, p_lo, p_hi, p_order, p_out, p_lse, p_marked,
    rows, i_both, i_half, left, masked, start, edge, middle, whole, turn, scale,
):  # fmt: skip
    """Attend with half of a tile's rows to all of its blocks."""
    STAGES: gl.constexpr = s_k.shape[0]
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    kind: gl.constexpr = p_out.dtype.element_ty
    i_tile = gl.program_id(0)
    o_sorted = i_tile * 128 + i_half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    m_row = o_sorted < rows
    o_row = gl.load(p_order + i_both * rows + o_sorted, mask=m_row, other=0)
    b_lo = gl.load(p_lo + o_row, mask=m_row, other=1)
    b_hi = gl.load(p_hi + o_row, mask=m_row, other=0)

    b_max = gl.full([64], float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    b_sum = gl.full([64], 0.0, gl.float32, layout=gl.SliceLayout(1, S))
    b_out = gl.full([64, D], 0.0, gl.float32, layout=OUT)
    b_none = gl.full([64, BLOCK_N], 0.0, gl.float32, layout=S)
    q = s_q.index(i_half)
    total = masked + whole
    if total > 0:
        n = _block(0, left, masked, start, edge, middle, whole, turn, BLOCK_N)
        mbarrier.wait(k_full.index(0), 0)
        b_s = warpgroup_mma(q, s_k.index(0).permute((1, 0)), b_none, use_acc=False)
        mbarrier.arrive(k_free.index(0), count=1)
        b_p, b_max, b_sum, b_keep = _weights(b_s, b_max, b_sum, b_lo, b_hi, n, masked > 0, scale, BLOCK_N, S)
        b_w = gl.convert_layout(b_p.to(kind), P)
        for i in range(1, total):
            n = _block(i, left, masked, start, edge, middle, whole, turn, BLOCK_N)
            place, before = i % STAGES, (i - 1) % STAGES
            mbarrier.wait(k_full.index(place), (i // STAGES) & 1)
            t_s = warpgroup_mma(q, s_k.index(place).permute((1, 0)), b_none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            t_out = warpgroup_mma(b_w, s_v.index(before), b_out, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=[t_s])
            mbarrier.arrive(k_free.index(place), count=1)
            b_p, b_max, b_sum, b_keep = _weights(b_s, b_max, b_sum, b_lo, b_hi, n, i < masked, scale, BLOCK_N, S)
            b_out, b_w = warpgroup_mma_wait(0, deps=[t_out, b_w])
            mbarrier.arrive(v_free.index(before), count=1)
            b_out = b_out * gl.convert_layout(b_keep, gl.SliceLayout(1, OUT))[:, None]
            b_w = gl.convert_layout(b_p.to(kind), P)
        before = (total - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((total - 1) // STAGES) & 1)
        b_out = warpgroup_mma(b_w, s_v.index(before), b_out)
        finite = gl.min(gl.min((gl.abs(b_out) <= float("inf")).to(gl.int32), 1), 0)  # NaN compares false
        gl.store(p_marked + (i_both * gl.num_programs(0) + i_tile) * 2 + i_half, 1 - finite)
    else:
        gl.store(p_marked + (i_both * gl.num_programs(0) + i_tile) * 2 + i_half, 0)

    m_none = (b_sum == 0.0) | (b_lo > b_hi)
    b_sum = gl.where(m_none, 1.0, b_sum)
    gl.store(p_lse + o_row, gl.where(m_none, float("-inf"), (b_max + gl.log2(b_sum)) * _LN_2), mask=m_row)
    b_part = gl.convert_layout(gl.where(m_none, 0.0, 1.0 / b_sum), gl.SliceLayout(1, OUT))
    b_out = gl.where(b_part[:, None] == 0.0, 0.0, b_out * b_part[:, None])
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    b_out = gl.convert_layout(b_out.to(kind), ROW)
    o_sorted = i_tile * 128 + i_half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROW))
    m_row = o_sorted < rows
    o_row = gl.load(p_order + i_both * rows + o_sorted, mask=m_row, other=0)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROW))
    gl.store(p_out + o_row[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None])


@gluon.jit
def span_attention_kernel(
    p_q, k_rows, v_rows, p_k_table, p_v_table, p_lo, p_hi, p_order, p_out, p_lse, p_marked,
    s_k_sequence, s_k_head, s_k_table, s_v_sequence, s_v_head, s_v_table,
    rows, kv_heads, beat, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    """Attend with a tile of 128 rows; strides of keys and values are counted in rows."""
    i_tile, i_both = gl.program_id(0), gl.program_id(1).to(gl.int64)
    i_sequence, i_head = i_both // kv_heads, i_both % kv_heads
    kind: gl.constexpr = p_out.dtype.element_ty
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_sorted = i_tile * 128 + gl.arange(0, 128, layout=ONE)
    m_row = o_sorted < rows
    o_row = gl.load(p_order + i_both * rows + o_sorted, mask=m_row, other=0)
    b_lo = gl.load(p_lo + o_row, mask=m_row, other=1)
    b_hi = gl.load(p_hi + o_row, mask=m_row, other=0)
    m_some = b_lo <= b_hi
    start = gl.min(gl.where(m_some, b_lo, 2147483647), 0)
    stop = gl.max(gl.where(m_some, b_hi, -1), 0) + 1
    # What every row reads wholly, from the last beginning to the first end, needs no mask.
    last = gl.max(gl.where(m_some, b_lo, 0), 0)
    end = gl.min(gl.where(m_some, b_hi, 2147483646), 0) + 1
    if start >= stop:
        start = stop * 0
        stop = start
        last = start
        end = start
    if BLOCK_N == 64:
        start = start // BLOCK_N * BLOCK_N  # no block crosses the end of a page
    left = gl.cdiv(last - start, BLOCK_N)
    whole = gl.maximum((end - start) // BLOCK_N - left, 0)
    left = gl.where(whole == 0, gl.cdiv(stop - start, BLOCK_N), left)
    middle = start + left * BLOCK_N
    edge = middle + whole * BLOCK_N
    masked = left + gl.cdiv(gl.maximum(stop - edge, 0), BLOCK_N)
    turn = (gl.cdiv(middle, beat) * beat - middle) // BLOCK_N
    turn = gl.where(turn < whole, turn, 0)

    s_q = gl.allocate_shared_memory(kind, [2, 64, D], gl.NVMMASharedLayout.get_default_for([64, D], kind))
    s_k = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, D], k_rows.layout)
    s_v = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, D], v_rows.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(STAGES):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
        mbarrier.init(k_free.index(j), count=2)
        mbarrier.init(v_free.index(j), count=2)
    ROW: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, ROW))
    for half in gl.static_range(2):
        o_mine = i_tile * 128 + half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROW))
        m_mine = o_mine < rows
        o_mine = gl.load(p_order + i_both * rows + o_mine, mask=m_mine, other=0)
        b_q = gl.load(p_q + (o_mine // SHARE)[:, None] * D + o_d[None, :], mask=m_mine[:, None], other=0.0)
        s_q.index(half).store(b_q)
    fence_async_shared()

    k_first = (i_sequence * s_k_sequence + i_head * s_k_head).to(gl.int32)
    v_first = (i_sequence * s_v_sequence + i_head * s_v_head).to(gl.int32)
    gl.warp_specialize(
        [
            (_attend, (
                s_q, s_k, s_v, k_full, k_free, v_full, v_free, p_lo, p_hi, p_order, p_out, p_lse, p_marked,
                rows, i_both, 0, left, masked, start, edge, middle, whole, turn, scale,
            )),
            (_attend, (
                s_q, s_k, s_v, k_full, k_free, v_full, v_free, p_lo, p_hi, p_order, p_out, p_lse, p_marked,
                rows, i_both, 1, left, masked, start, edge, middle, whole, turn, scale,
            )),
            (_bring, (
                k_rows, v_rows, p_k_table + i_sequence * s_k_table, p_v_table + i_sequence * s_v_table,
                k_first, v_first, s_k, s_v, k_full, k_free, v_full, v_free,
                left, masked, start, edge, middle, whole, turn,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def described(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x as `kernels.engine.described` does, for this language."""
    from longspan.kernels import engine

    plain = engine.described(x, rows)
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(list(plain.block_shape), kind)
    return TensorDescriptor(plain.base, list(plain.shape), list(plain.strides), list(plain.block_shape), layout)


def keys_of(held: Held) -> int:
    """Return how many keys a block has: pages are brought one at a time."""
    return PAGE if held.kind == PAGES else 128


def launch(
    q: Tensor, k: Held, v: Held, lo: Tensor, hi: Tensor, order: Tensor, out: Tensor, lse: Tensor, *,
    scale: float, beat: int,
) -> Tensor:  # fmt: skip
    """Run the kernel; return int32 `[B * H, 2 * tiles]`, not 0 for halves of tiles to be done with more care.

    Args:
        q: `[B, H, R / s, D]` without gaps.
        k: both tensors, or both pages, that the engine can copy (`kernels.engine.can_copy`).
        v: of keys' head size.
        lo: int32 `[B, H, R]` without gaps.
        hi: the same.
        order: int64 `[B * H, R]`, as `launch.span_attention` takes it.
        out: `[B, H, R, D]` of q's type, written.
        lse: float32 `[B, H, R]`, written.
        scale: in base 2.
        beat: as there.
    """
    batch, heads, rows = lo.shape
    keys = keys_of(k)
    tiles = -(-rows // ROWS)
    marked = torch.empty(batch * heads, 2 * tiles, dtype=torch.int32, device=q.device)
    _, k_table, _, _, *k_strides = k.arguments()
    _, v_table, _, _, *v_strides = v.arguments()
    span_attention_kernel[(tiles, batch * heads)](
        q, described(k.rows, keys), described(v.rows, keys), k_table, v_table, lo, hi, order, out, lse, marked,
        k_strides[0] // k_strides[3], k_strides[1] // k_strides[3], k_strides[4],
        v_strides[0] // v_strides[3], v_strides[1] // v_strides[3], v_strides[4],
        rows, heads, beat or 1, scale,
        D=q.shape[-1], BLOCK_N=keys, STAGES=2 if keys == 128 else 4, SHARE=rows // q.shape[2],
        num_warps=4,
    )  # fmt: skip
    return marked
