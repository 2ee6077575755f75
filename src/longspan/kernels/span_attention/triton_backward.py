"""Gradients of span attention as Triton kernels: rows sorted by where their span begins, nothing added atomically.

A row is a query of one of a KV head's query heads; each of its spans makes a list of rows of its own, sorted, in which
neighbours read nearly the same keys. `_queries_kernel` takes tiles of such rows and walks over their keys: dq, added up
one span after the other, or what the output of each span has in common with the gradient. `_keys_kernel` takes blocks
of keys and walks over the stretch of each list that reads any of them: dk and dv, each written once. So every sum has
one order, and two runs are equal to the last bit.

Matrix products as in `triton_kernels.py`; sums are float32. Weights are computed again from the log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.engine import can_copy, described
from longspan.kernels.span_attention.order import LOG2_E, SpanOrder
from longspan.kernels.tiles import Tile, hopper, roomy


@triton.jit
def _rows(p_order, p_facts, i_list, start, stop, length, queries, BLOCK_R: tl.constexpr):
    """Return the next rows of a list: which they are, first key and length (less 1), log-sum-exp (base 2) and delta.

    What lies beyond the list is 0: its queries and gradients must be, too.
    """
    o_sorted = start + tl.arange(0, BLOCK_R)
    m_row = o_sorted < stop
    o_sorted += i_list * length
    o_row = tl.load(p_order + o_sorted, mask=m_row, other=0).to(tl.int64)  # [BLOCK_R]
    m_row &= o_row < queries
    # One load of four numbers a row; a load of each would be one for every thread that needs it.
    p_four = p_facts + o_sorted[:, None] * 4 + tl.arange(0, 4)[None, :]
    b_four = tl.load(p_four, mask=m_row[:, None], other=0)  # [BLOCK_R, 4]
    b_even, b_odd = tl.split(tl.reshape(b_four, [BLOCK_R, 2, 2]))
    b_lo, b_lse = tl.split(b_even)
    b_length, b_delta = tl.split(b_odd)
    return o_row, m_row, b_lo, b_length, b_lse.to(tl.float32, bitcast=True), b_delta.to(tl.float32, bitcast=True)


@triton.jit
def _weights(b_s, o_n, b_lo, b_length, b_lse, scale):
    """Return the weights of scores `b_s`; the others are of shapes that broadcast to it. 0: not read."""
    # A key before the span is a great number, unsigned: one comparison says whether it is read.
    b_within = (o_n - b_lo).to(tl.uint32, bitcast=True)
    return tl.where(b_within <= b_length.to(tl.uint32, bitcast=True), tl.exp2(b_s * scale - b_lse), 0.0)


@triton.jit(do_not_specialize=["queries", "length", "i_span"])
def _queries_kernel(
    p_q, p_k, p_v, p_do, p_order, p_facts, p_before, p_out,
    s_k_batch, s_k_head, s_k_token, s_v_batch, s_v_head, s_v_token,
    kv_heads, queries, length, i_span, spans, bands, scale, exponent,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, PRODUCTS: tl.constexpr, SPARSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write dq of one span of every query, and what `p_before` holds (ADD); or `do . out` of the span (PRODUCTS).

    Where copies are the engine's (TMA), `p_k` and `p_v` describe keys and values.
    """
    i_head = tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    tiles = tl.cdiv(length, BLOCK_R)
    i_list = (i_head * spans + i_span) * bands + tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK_R
    o_row, m_row, b_lo, b_length, b_lse, b_delta = _rows(
        p_order, p_facts, i_list, start, length, length, queries, BLOCK_R
    )
    m_some = m_row & (b_length >= 0)
    first = tl.min(tl.where(m_some, b_lo, 2147483647), 0)
    stop = tl.max(tl.where(m_some, b_lo + b_length, -1), 0) + 1
    o_row += i_head * queries
    o_d, o_dv, o_n = tl.arange(0, B_D), tl.arange(0, B_DV), tl.arange(0, BLOCK_N)
    m_d, m_dv = (o_d < D)[None, :], (o_dv < DV)[None, :]
    b_q = tl.load(p_q + o_row[:, None] * D + o_d[None, :], mask=m_row[:, None] & m_d, other=0.0)  # [BLOCK_R, B_D]
    b_do = tl.load(p_do + o_row[:, None] * DV + o_dv[None, :], mask=m_row[:, None] & m_dv, other=0.0)
    b_dq = tl.zeros([BLOCK_R, B_D], tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    o_keys = o_n[:, None] * s_k_token + o_d[None, :]
    o_values = o_n[:, None] * s_v_token + o_dv[None, :]
    o_k, o_v = i_batch * s_k_batch + i_kv * s_k_head, i_batch * s_v_batch + i_kv * s_v_head
    for i in range(tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N)):
        n = first + i * BLOCK_N
        touched = 1
        if SPARSE:
            touched = tl.max((m_some & (b_lo < n + BLOCK_N) & (b_lo + b_length >= n)).to(tl.int32), 0)
        if touched > 0:
            # [BLOCK_N, B_D] and [BLOCK_N, B_DV]
            if TMA:
                b_k = p_k.load([(o_k // s_k_token).to(tl.int32) + n, 0])
                b_v = p_v.load([(o_v // s_v_token).to(tl.int32) + n, 0])
            else:
                m_n = (n + o_n < stop)[:, None]
                p_keys, p_values = p_k + o_k + n.to(tl.int64) * s_k_token, p_v + o_v + n.to(tl.int64) * s_v_token
                b_k = tl.load(p_keys + o_keys, mask=m_n & m_d, other=0.0)
                b_v = tl.load(p_values + o_values, mask=m_n & m_dv, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_R, BLOCK_N]
            b_p = _weights(b_s, n + o_n[None, :], b_lo[:, None], b_length[:, None], b_lse[:, None], exponent)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            if PRODUCTS:
                b_sum += tl.sum(b_p * b_dp, 1)
            else:
                b_ds = b_p * (b_dp - b_delta[:, None])
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if PRODUCTS:
        tl.store(p_out + o_row * spans + i_span, b_sum, mask=m_row)
    else:
        b_dq *= scale
        o_out, m_out = o_row[:, None] * D + o_d[None, :], m_row[:, None] & m_d
        if ADD:
            b_dq += tl.load(p_before + o_out, mask=m_out, other=0.0)
        tl.store(p_out + o_out, b_dq.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["queries", "length", "keys"])
def _keys_kernel(
    p_q, p_k, p_v, p_do, p_order, p_facts, p_first, p_last, p_dk, p_dv,
    s_k_batch, s_k_head, s_k_token, s_v_batch, s_v_head, s_v_token,
    kv_heads, queries, length, keys, lists, scale, exponent,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one block of keys, from the rows `p_first .. p_last - 1` of every list."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    blocks = tl.num_programs(0)
    i_block = blocks - 1 - tl.program_id(0)  # the newest keys first: every window reads them
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    m_n, m_d, m_dv = (o_n < keys)[:, None], (o_d < D)[None, :], (o_dv < DV)[None, :]
    o_key = o_n.to(tl.int64)[:, None]
    p_keys = p_k + i_batch * s_k_batch + i_kv * s_k_head + o_key * s_k_token + o_d[None, :]
    b_k = tl.load(p_keys, mask=m_n & m_d, other=0.0)  # [BLOCK_N, B_D]
    p_values = p_v + i_batch * s_v_batch + i_kv * s_v_head + o_key * s_v_token + o_dv[None, :]
    b_v = tl.load(p_values, mask=m_n & m_dv, other=0.0)  # [BLOCK_N, B_DV]
    b_dk = tl.zeros([BLOCK_N, B_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, B_DV], tl.float32)
    p_q += i_head * queries * D
    p_do += i_head * queries * DV
    for i in range(lists):
        i_list = i_head * lists + i
        start, stop = tl.load(p_first + i_list * blocks + i_block), tl.load(p_last + i_list * blocks + i_block)
        for r in range(start, stop, BLOCK_R):
            o_row, m_row, b_lo, b_length, b_lse, b_delta = _rows(
                p_order, p_facts, i_list, r, stop, length, queries, BLOCK_R
            )
            m_row, o_row = m_row[:, None], o_row[:, None]
            b_q = tl.load(p_q + o_row * D + o_d[None, :], mask=m_row & m_d, other=0.0)  # [BLOCK_R, B_D]
            b_do = tl.load(p_do + o_row * DV + o_dv[None, :], mask=m_row & m_dv, other=0.0)  # [BLOCK_R, B_DV]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            b_p = _weights(b_s, o_n[:, None], b_lo[None, :], b_length[None, :], b_lse[None, :], exponent)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_dks = p_dk + (i_head * keys + o_key) * D + o_d[None, :]
    tl.store(p_dks, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_n & m_d)
    p_dvs = p_dv + (i_head * keys + o_key) * DV + o_dv[None, :]
    tl.store(p_dvs, b_dv.to(p_dv.dtype.element_ty), mask=m_n & m_dv)


@triton.jit(do_not_specialize=["rows"])
def _row_products_kernel(
    p_do, p_out, p_product, rows, SHARE: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr, BLOCK_R: tl.constexpr
):
    o_row, o_dv = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, B_DV)
    m = (o_row < rows)[:, None] & (o_dv < DV)[None, :]
    b_do = tl.load(p_do + (o_row // SHARE)[:, None] * DV + o_dv[None, :], mask=m, other=0.0)  # [BLOCK_R, B_DV]
    b_out = tl.load(p_out + o_row[:, None] * DV + o_dv[None, :], mask=m, other=0.0)
    tl.store(p_product + o_row, tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1), mask=o_row < rows)


def row_products(do: Tensor, out: Tensor) -> Tensor:
    """Return `do . out` of each row, float32; see the reference."""
    do, out = do.contiguous(), out.contiguous()
    product = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device)
    if product.numel():
        width = triton.next_power_of_2(out.shape[-1])
        _row_products_kernel[(triton.cdiv(product.numel(), 32),)](
            do, out, product, product.numel(),
            SHARE=out.numel() // do.numel(), DV=out.shape[-1], B_DV=width, BLOCK_R=32,
        )  # fmt: skip
    return product


def span_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    *,
    scale: float,
    order: SpanOrder | None = None,
    tiles: tuple[Tile, Tile] | None = None,
    engine: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that come through the spans, as the reference does, each in the type of k.

    Args:
        q: as in the reference; brought to k's type.
        k: as there; may be a view whose last axis lies together.
        v: the same, of k's type.
        lo: as there.
        hi: as there.
        lse: as there.
        delta: as there.
        do: as there.
        scale: as there.
        order: the spans, sorted; None: they are sorted here.
        tiles: how the kernels of dq and of dk and dv are cut; None: as `backward_tiles` says.
        engine: whether Hopper's copy engine brings keys and values for dq, where it can; None: on Hopper.
    """
    q, do = q.to(k.dtype).contiguous(), do.to(k.dtype).contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    kv_heads, keys, spans = k.shape[1], k.shape[2], lo.shape[-1]
    order = order or SpanOrder.of(lo, hi, kv_heads, keys)
    copied = _copied(k, v, engine)
    for_queries, for_keys = tiles or backward_tiles(k.dtype, max(k.shape[-1], v.shape[-1]), roomy(k.device), copied)
    rows = (order.rows, order.facts(lse, delta))
    queries, length = q.shape[1] // kv_heads * q.shape[2], order.rows.shape[1]
    strides = (*k.stride()[:3], *v.stride()[:3])

    first, last = order.stretches(keys, for_keys.keys)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _keys_kernel[(triton.cdiv(keys, for_keys.keys), k.shape[0] * kv_heads)](
        q, k, v, do, *rows, first, last, dk, dv, *strides,
        kv_heads, queries, length, keys, spans * order.bands, scale, scale * LOG2_E,
        **_constants(k, v, for_keys),
    )  # fmt: skip

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Sums over spans are kept in float32 and rounded once, by the last one.
    single = spans == 1 or dq.dtype == torch.float32
    total = dq if single else torch.empty(q.shape, dtype=torch.float32, device=q.device)
    k_rows, v_rows = (described(x, for_queries.keys) if copied else x for x in (k, v))
    for j in range(spans):
        _queries_kernel[(triton.cdiv(length, for_queries.rows) * order.bands, k.shape[0] * kv_heads)](
            q, k_rows, v_rows, do, *rows, total, dq if j == spans - 1 else total, *strides,
            kv_heads, queries, length, j, spans, order.bands, scale, scale * LOG2_E, ADD=j > 0, PRODUCTS=False,
            SPARSE=_sparse(length, keys, for_queries), TMA=copied, **_constants(k, v, for_queries),
        )  # fmt: skip
    return dq, dk, dv


def span_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    lse: Tensor,
    do: Tensor,
    *,
    scale: float,
    order: SpanOrder | None = None,
    tile: Tile | None = None,
    engine: bool | None = None,
) -> Tensor:
    """Return `do . out` for the output of each span alone, float32; arguments as in the reference and above."""
    q, do = q.to(k.dtype).contiguous(), do.to(k.dtype).contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    kv_heads, keys, spans = k.shape[1], k.shape[2], lo.shape[-1]
    order = order or SpanOrder.of(lo, hi, kv_heads, keys)
    copied = _copied(k, v, engine)
    tile = tile or backward_tiles(k.dtype, max(k.shape[-1], v.shape[-1]), roomy(k.device), copied)[0]
    facts = order.facts(lse, torch.zeros_like(lse))
    out = torch.empty(lo.shape, dtype=torch.float32, device=q.device)
    queries, length = q.shape[1] // kv_heads * q.shape[2], order.rows.shape[1]
    k_rows, v_rows = (described(x, tile.keys) if copied else x for x in (k, v))
    for j in range(spans):
        _queries_kernel[(triton.cdiv(length, tile.rows) * order.bands, k.shape[0] * kv_heads)](
            q, k_rows, v_rows, do, order.rows, facts, out, out, *k.stride()[:3], *v.stride()[:3],
            kv_heads, queries, length, j, spans, order.bands, scale, scale * LOG2_E, ADD=False, PRODUCTS=True,
            SPARSE=_sparse(length, keys, tile), TMA=copied, **_constants(k, v, tile),
        )  # fmt: skip
    return out


def backward_tiles(dtype: torch.dtype, dim: int, roomy: bool, copied: bool = False) -> tuple[Tile, Tile]:
    """Return the tiles of dq, and of dk and dv, for keys of this type and head size; see `tiles.roomy`.

    `copied`: the copy engine brings blocks for dq, which leaves registers for wider ones.
    """
    if dtype == torch.float32:
        small = Tile(16, 16, 4, 1) if dim > 128 else Tile(32, 16, 4, 1) if dim > 64 else Tile(32, 32, 4, 1)
        return small, Tile(small.keys, small.rows, 4, 1)
    if dim > 128:
        return (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)) if roomy else (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if roomy:
        # Three stages: which rows, then the rows, then products.
        return Tile(128, 128 if copied else 64, 8, 2), Tile(64, 128, 8, 3)
    return Tile(64, 64, 8, 1), Tile(32, 64, 4, 2)


def _copied(k: Tensor, v: Tensor, engine: bool | None) -> bool:
    """Return whether the copy engine brings keys and values to the kernel of dq.

    It also brings rows that no row of the tile reads: these must be numbers, so that nothing may lie between heads.
    """
    engine = hopper(k.device) if engine is None else engine
    return engine and all(can_copy(x) and x.is_contiguous() for x in (k, v))


def _sparse(length: int, keys: int, tile: Tile) -> bool:
    """Return whether lists are so short that rows of a tile lie far apart: keys that none of them reads are skipped."""
    return length // tile.rows * 8192 < keys


def _constants(k: Tensor, v: Tensor, tile: Tile) -> dict[str, int | str]:
    dim, value_dim = k.shape[-1], v.shape[-1]
    return {
        "D": dim,
        "DV": value_dim,
        "B_D": max(16, triton.next_power_of_2(dim)),
        "B_DV": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_R": tile.rows,
        "BLOCK_N": tile.keys,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
