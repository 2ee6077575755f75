"""Gradients of span attention as Triton kernels: rows sorted by where their span begins, nothing added atomically.

A row is a query of one of a KV head's query heads; each of its spans makes a list of rows of its own, sorted, in which
neighbours read nearly the same keys. `_queries_kernel` takes tiles of such rows and walks over their keys: dq, added up
one span after the other, or what the output of each span has in common with the gradient. `_keys_kernel` takes blocks
of keys and walks over the stretch of each list that reads any of them: dk and dv, each written once. So every sum has
one order, and two runs are equal to the last bit.

Matrix products as in `triton_kernels.py`; sums are float32. Weights are computed again from the log-sum-exp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.span_attention.order import SpanOrder
from longspan.kernels.tiles import Tile, roomy

_LOG2_E = math.log2(math.e)


@triton.jit
def _rows(
    p_order, p_lo, p_hi, p_lse, i_list, start, stop, queries,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Return the next rows of a list: which they are, their spans and log-sum-exp, and whether they read anything."""
    o_sorted = start + tl.arange(0, BLOCK_R)
    m_row = o_sorted < stop
    o_sorted += i_list * queries
    o_row = tl.load(p_order + o_sorted, mask=m_row, other=0)  # [BLOCK_R]
    b_lo = tl.load(p_lo + o_sorted, mask=m_row, other=0)
    b_hi = tl.load(p_hi + o_sorted, mask=m_row, other=-1)
    b_lse = tl.load(p_lse + o_sorted, mask=m_row, other=float("inf"))
    return o_sorted, o_row, m_row, b_lo, b_hi, b_lse


@triton.jit
def _weights(b_s, o_n, b_lo, b_hi, b_lse, scale):
    """Return the weights of scores `b_s`; the other three are of shapes that broadcast to it. 0: not read."""
    m_read = (o_n >= b_lo) & (o_n <= b_hi)
    return tl.where(m_read, tl.exp2(b_s * scale - b_lse), 0.0)


@triton.jit(do_not_specialize=["queries", "count", "i_span"])
def _queries_kernel(
    p_q, p_k, p_v, p_do, p_order, p_lo, p_hi, p_lse, p_delta, p_before, p_out,
    s_q_batch, s_q_head, s_q_token, s_k_batch, s_k_head, s_k_token,
    s_v_batch, s_v_head, s_v_token, s_do_batch, s_do_head, s_do_token,
    kv_heads, queries, count, i_span, spans, scale, exponent,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr, PRODUCTS: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """Write dq of one span of every query, and what `p_before` holds (ADD); or `do . out` of the span (PRODUCTS)."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    start = tl.program_id(0) * BLOCK_R
    o_sorted, o_row, m_row, b_lo, b_hi, b_lse = _rows(
        p_order, p_lo, p_hi, p_lse, i_head * spans + i_span, start, queries, queries, BLOCK_R
    )
    first = tl.min(tl.where(b_lo <= b_hi, b_lo, 2147483647), 0)
    stop = tl.max(b_hi, 0) + 1
    o_group, o_t = o_row // count, (o_row % count).to(tl.int64)
    o_d, o_dv, o_n = tl.arange(0, B_D), tl.arange(0, B_DV), tl.arange(0, BLOCK_N)
    p_rows = p_q + i_batch * s_q_batch + ((i_kv * G + o_group) * s_q_head + o_t * s_q_token)[:, None] + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_R, B_D]
    p_rows = (
        p_do + i_batch * s_do_batch + ((i_kv * G + o_group) * s_do_head + o_t * s_do_token)[:, None] + o_dv[None, :]
    )
    b_do = tl.load(p_rows, mask=m_row[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BLOCK_R, B_DV]
    b_delta = tl.zeros([BLOCK_R], tl.float32) if PRODUCTS else tl.load(p_delta + o_sorted, mask=m_row, other=0.0)
    b_dq = tl.zeros([BLOCK_R, B_D], tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    o_keys = o_n[:, None] * s_k_token + o_d[None, :]
    o_values = o_n[:, None] * s_v_token + o_dv[None, :]
    p_k += i_batch * s_k_batch + i_kv * s_k_head
    p_v += i_batch * s_v_batch + i_kv * s_v_head
    for i in range(tl.cdiv(tl.maximum(stop - first, 0), BLOCK_N)):
        n = first + i * BLOCK_N
        touched = 1
        if SPARSE:
            touched = tl.max(((b_lo < n + BLOCK_N) & (b_hi >= n)).to(tl.int32), 0)
        if touched > 0:
            m_n = (n + o_n < stop)[:, None]
            p_keys, p_values = p_k + n.to(tl.int64) * s_k_token + o_keys, p_v + n.to(tl.int64) * s_v_token + o_values
            b_k = tl.load(p_keys, mask=m_n & (o_d < D)[None, :], other=0.0)  # [BLOCK_N, B_D]
            b_v = tl.load(p_values, mask=m_n & (o_dv < DV)[None, :], other=0.0)  # [BLOCK_N, B_DV]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_R, BLOCK_N]
            b_p = _weights(b_s, n + o_n[None, :], b_lo[:, None], b_hi[:, None], b_lse[:, None], exponent)
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if PRODUCTS:
                b_sum += tl.sum(b_ds, 1)
            else:
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if PRODUCTS:
        tl.store(p_out + (i_head * queries + o_row) * spans + i_span, b_sum, mask=m_row)
    else:
        b_dq *= scale
        o_out = (i_head * queries + o_row)[:, None] * D + o_d[None, :]
        m_out = m_row[:, None] & (o_d < D)[None, :]
        if ADD:
            b_dq += tl.load(p_before + o_out, mask=m_out, other=0.0)
        tl.store(p_out + o_out, b_dq.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["queries", "count", "keys"])
def _keys_kernel(
    p_q, p_k, p_v, p_do, p_order, p_lo, p_hi, p_lse, p_delta, p_first, p_last, p_dk, p_dv,
    s_q_batch, s_q_head, s_q_token, s_k_batch, s_k_head, s_k_token,
    s_v_batch, s_v_head, s_v_token, s_do_batch, s_do_head, s_do_token,
    kv_heads, queries, count, keys, spans, scale, exponent,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one block of keys: for every span, the rows `p_first .. p_last - 1` of its list."""
    i_head = tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    blocks = tl.num_programs(0)
    i_block = blocks - 1 - tl.program_id(0)  # the newest keys first: every window reads them
    o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < keys)[:, None]
    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    o_key = o_n.to(tl.int64)[:, None]
    p_keys = p_k + i_batch * s_k_batch + i_kv * s_k_head + o_key * s_k_token + o_d[None, :]
    b_k = tl.load(p_keys, mask=m_n & (o_d < D)[None, :], other=0.0)  # [BLOCK_N, B_D]
    p_values = p_v + i_batch * s_v_batch + i_kv * s_v_head + o_key * s_v_token + o_dv[None, :]
    b_v = tl.load(p_values, mask=m_n & (o_dv < DV)[None, :], other=0.0)  # [BLOCK_N, B_DV]
    b_dk = tl.zeros([BLOCK_N, B_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, B_DV], tl.float32)
    p_q += i_batch * s_q_batch + i_kv * G * s_q_head
    p_do += i_batch * s_do_batch + i_kv * G * s_do_head
    for i_span in range(spans):
        i_list = i_head * spans + i_span
        start, stop = tl.load(p_first + i_list * blocks + i_block), tl.load(p_last + i_list * blocks + i_block)
        for r in range(start, stop, BLOCK_R):
            o_sorted, o_row, m_row, b_lo, b_hi, b_lse = _rows(
                p_order, p_lo, p_hi, p_lse, i_list, r, stop, queries, BLOCK_R
            )
            b_delta = tl.load(p_delta + o_sorted, mask=m_row, other=0.0)
            o_group, o_t = o_row // count, (o_row % count).to(tl.int64)
            p_rows = p_q + (o_group * s_q_head + o_t * s_q_token)[:, None] + o_d[None, :]
            b_q = tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_R, B_D]
            p_rows = p_do + (o_group * s_do_head + o_t * s_do_token)[:, None] + o_dv[None, :]
            b_do = tl.load(p_rows, mask=m_row[:, None] & (o_dv < DV)[None, :], other=0.0)  # [BLOCK_R, B_DV]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            b_p = _weights(b_s, o_n[:, None], b_lo[None, :], b_hi[None, :], b_lse[None, :], exponent)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_R]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_dks = p_dk + (i_head * keys + o_key) * D + o_d[None, :]
    tl.store(p_dks, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_n & (o_d < D)[None, :])
    p_dvs = p_dv + (i_head * keys + o_key) * DV + o_dv[None, :]
    tl.store(p_dvs, b_dv.to(p_dv.dtype.element_ty), mask=m_n & (o_dv < DV)[None, :])


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that come through the spans, as the reference does, each in the type of k.

    Args:
        q: as in the reference; brought to k's type. This and the next may be views whose last axis lies together.
        k: as there.
        v: as there, of k's type.
        lo: as there.
        hi: as there.
        lse: as there.
        delta: as there.
        do: as there.
        scale: as there.
        order: the spans, sorted; None: they are sorted here.
        tiles: how the kernels of dq and of dk and dv are cut; None: as `backward_tiles` says.
    """
    q, do, k, v = _laid_out(q.to(k.dtype), do.to(k.dtype), k, v)
    kv_heads, keys, spans = k.shape[1], k.shape[2], lo.shape[-1]
    order = order or SpanOrder.of(lo, hi, kv_heads, keys)
    sorted_lse = order.sorted(lse, kv_heads, _LOG2_E, float("inf"))
    sorted_delta = order.sorted(delta, kv_heads)
    for_queries, for_keys = tiles or backward_tiles(k.dtype, max(k.shape[-1], v.shape[-1]), roomy(k.device))
    rows = (order.rows, order.lo, order.hi, sorted_lse, sorted_delta)

    first, last = order.stretches(keys, for_keys.keys)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    queries = order.rows.shape[1]
    common = (kv_heads, queries, q.shape[2])
    _keys_kernel[(triton.cdiv(keys, for_keys.keys), k.shape[0] * kv_heads)](
        q, k, v, do, *rows, first, last, dk, dv, *_strides(q, k, v, do),
        *common, keys, spans, scale, scale * _LOG2_E,
        **_constants(q, k, v, for_keys),
    )  # fmt: skip

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Sums over spans are kept in float32 and rounded once, by the last one.
    total = (
        dq if spans == 1 or dq.dtype == torch.float32 else torch.empty(q.shape, dtype=torch.float32, device=q.device)
    )
    for j in range(spans):
        _queries_kernel[(triton.cdiv(queries, for_queries.rows), k.shape[0] * kv_heads)](
            q, k, v, do, *rows, total, dq if j == spans - 1 else total, *_strides(q, k, v, do),
            *common, j, spans, scale, scale * _LOG2_E,
            ADD=j > 0, PRODUCTS=False, SPARSE=_sparse(queries, keys, for_queries), **_constants(q, k, v, for_queries),
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
) -> Tensor:
    """Return `do . out` for the output of each span alone, float32; arguments as in the reference and above."""
    q, do, k, v = _laid_out(q.to(k.dtype), do.to(k.dtype), k, v)
    kv_heads, keys, spans = k.shape[1], k.shape[2], lo.shape[-1]
    order = order or SpanOrder.of(lo, hi, kv_heads, keys)
    sorted_lse = order.sorted(lse, kv_heads, _LOG2_E, float("inf"))
    tile = tile or backward_tiles(k.dtype, max(k.shape[-1], v.shape[-1]), roomy(k.device))[0]
    out = torch.empty(lo.shape, dtype=torch.float32, device=q.device)
    queries = order.rows.shape[1]
    for j in range(spans):
        _queries_kernel[(triton.cdiv(queries, tile.rows), k.shape[0] * kv_heads)](
            q, k, v, do, order.rows, order.lo, order.hi, sorted_lse, sorted_lse, out, out, *_strides(q, k, v, do),
            kv_heads, queries, q.shape[2], j, spans, scale, scale * _LOG2_E,
            ADD=False, PRODUCTS=True, SPARSE=_sparse(queries, keys, tile), **_constants(q, k, v, tile),
        )  # fmt: skip
    return out


def backward_tiles(dtype: torch.dtype, dim: int, roomy: bool) -> tuple[Tile, Tile]:
    """Return the tiles of dq, and of dk and dv, for keys of this type and head size; see `tiles.roomy`."""
    if dtype == torch.float32:
        small = Tile(16, 16, 4, 1) if dim > 128 else Tile(32, 16, 4, 1) if dim > 64 else Tile(32, 32, 4, 1)
        return small, Tile(small.keys, small.rows, 4, 1)
    if dim > 128:
        return (Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)) if roomy else (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if roomy:
        return Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)
    return Tile(64, 64, 8, 1), Tile(32, 64, 4, 2)


def _laid_out(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def _sparse(queries: int, keys: int, tile: Tile) -> bool:
    """Return whether rows are so few that those of a tile lie far apart: keys that none of them reads are left out."""
    return queries // tile.rows * 8192 < keys


def _constants(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> dict[str, int | str]:
    dim, value_dim = k.shape[-1], v.shape[-1]
    return {
        "G": q.shape[1] // k.shape[1],
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
