"""Gradients of anchors' search scores as two Triton kernels, nothing added atomically.

`_queries_kernel` gathers the anchors' keys of a tile of queries. `_keys_kernel` takes blocks of keys and walks over
the rows (a query and one of its anchors, sorted by anchor) whose anchor lies in them: a small matrix product with one
number a row, that of its anchor's key. So every sum has one order, and two runs are equal to the last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.span_attention.order import SpanOrder
from longspan.kernels.tiles import Tile


@triton.jit(do_not_specialize=["queries", "count"])
def _queries_kernel(
    p_k, p_anchor, p_ds, p_dq, s_k_batch, s_k_head, s_k_token, kv_heads, queries, count, spans,
    D: tl.constexpr, B_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    i_head = tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    o_row, o_d = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, B_D)
    m_row, m_d = o_row < queries, (o_d < D)[None, :]
    o_row = i_head * queries + o_row
    b_dq = tl.zeros([BLOCK_R, B_D], tl.float32)
    for i_span in range(spans):
        b_anchor = tl.load(p_anchor + o_row * spans + i_span, mask=m_row, other=0).to(tl.int64)  # [BLOCK_R]
        b_ds = tl.load(p_ds + o_row * spans + i_span, mask=m_row, other=0.0)
        p_keys = p_k + i_batch * s_k_batch + i_kv * s_k_head + (b_anchor * s_k_token)[:, None] + o_d[None, :]
        b_k = tl.load(p_keys, mask=(m_row & (b_ds != 0.0))[:, None] & m_d, other=0.0)  # [BLOCK_R, B_D]
        b_dq += b_k.to(tl.float32) * b_ds[:, None]
    tl.store(p_dq + o_row[:, None] * D + o_d[None, :], b_dq.to(p_dq.dtype.element_ty), mask=m_row[:, None] & m_d)


@triton.jit(do_not_specialize=["queries", "count", "keys"])
def _keys_kernel(
    p_q, p_row, p_anchor, p_ds, p_first, p_last, p_dk,
    s_q_batch, s_q_head, s_q_token, s_dk_batch, s_dk_head, s_dk_token,
    kv_heads, queries, count, keys, spans,
    G: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_batch, i_kv = i_head // kv_heads, i_head % kv_heads
    o_n, o_d = i_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, B_D)
    m_d = (o_d < D)[None, :]
    p_q += i_batch * s_q_batch + i_kv * G * s_q_head
    b_dk = tl.zeros([BLOCK_N, B_D], tl.float32)
    for i_span in range(spans):
        i_list = i_head * spans + i_span
        o_edge = i_list * tl.num_programs(0) + i_block
        start, stop = tl.load(p_first + o_edge), tl.load(p_last + o_edge)
        for r in range(start, stop, BLOCK_R):
            o_sorted = r + tl.arange(0, BLOCK_R)
            m_row = o_sorted < stop
            o_sorted += i_list * queries
            o_row = tl.load(p_row + o_sorted, mask=m_row, other=0)  # [BLOCK_R]
            b_anchor = tl.load(p_anchor + o_sorted, mask=m_row, other=-1)
            b_ds = tl.load(p_ds + o_sorted, mask=m_row, other=0.0)
            p_rows = p_q + ((o_row // count) * s_q_head + (o_row % count).to(tl.int64) * s_q_token)[:, None]
            b_q = tl.load(p_rows + o_d[None, :], mask=m_row[:, None] & m_d, other=0.0)  # [BLOCK_R, B_D]
            b_ones = tl.where(o_n[:, None] == b_anchor[None, :], b_ds[None, :], 0.0)  # [BLOCK_N, BLOCK_R]
            b_dk = tl.dot(b_ones.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    p_dks = p_dk + i_batch * s_dk_batch + i_kv * s_dk_head + o_n.to(tl.int64)[:, None] * s_dk_token + o_d[None, :]
    m = (o_n < keys)[:, None] & m_d
    b_dk += tl.load(p_dks, mask=m, other=0.0).to(tl.float32)
    tl.store(p_dks, b_dk.to(p_dk.dtype.element_ty), mask=m)


def anchor_scores_backward(q: Tensor, k: Tensor, anchors: Tensor, d_scores: Tensor, dk: Tensor) -> Tensor:
    """Add the keys' gradients to `dk`, and return the queries', in q's type; arguments as in the reference.

    Queries and keys may be views whose last axis lies together.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    assert dk.stride(-1) == 1
    batch, heads, count, dim = q.shape
    kv_heads, keys, spans = k.shape[1], k.shape[2], anchors.shape[-1]
    queries = heads // kv_heads * count
    anchors, d_scores = anchors.int().contiguous(), d_scores.float().contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cut = tile(dim)
    sizes = {"D": dim, "B_D": max(16, triton.next_power_of_2(dim)), "BLOCK_R": cut.rows}
    sizes |= {"num_warps": cut.warps, "num_stages": cut.stages}
    _queries_kernel[(triton.cdiv(queries, cut.rows), batch * kv_heads)](
        k, anchors, d_scores, dq, *k.stride()[:3], kv_heads, queries, count, spans, **sizes
    )
    order = SpanOrder.of(anchors, torch.where(d_scores == 0, -1, anchors), kv_heads, keys)
    first, last = order.stretches(keys, cut.keys)
    _keys_kernel[(triton.cdiv(keys, cut.keys), batch * kv_heads)](
        q, order.rows, order.lo, order.sorted(d_scores), first, last, dk,
        *q.stride()[:3], *dk.stride()[:3], kv_heads, queries, count, keys, spans,
        G=heads // kv_heads, BLOCK_N=cut.keys, PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee", **sizes,
    )  # fmt: skip
    return dq


def tile(dim: int) -> Tile:
    """Return how both kernels are cut for keys of this head size."""
    return Tile(32, 32 if dim > 128 else 64, 4, 3)
