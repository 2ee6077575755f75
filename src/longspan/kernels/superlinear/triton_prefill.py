"""Prefill of superlinear attention on a GPU: search, spans in order of where they begin, window, merge.

A row is a query, one of its heads and one of its spans. The rows of a KV head, sorted by where their span begins, fall
into tiles that read nearly the same keys (32K queries at 1M: neighbouring rows begin less than a key apart), and a tile
runs as plain flash attention, masked only at its two ends. What is kept between the steps is one output of each span
in the queries' type, and its log-sum-exp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.superlinear.search import Search
from longspan.kernels.superlinear.triton_search import search_kernel


def search_spans(
    q: Tensor, k: Held, first: int, search: Search, anchors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the spans of every query.

    Args:
        q: unrotated routing queries `[B, Hq, T, D]` of the tokens `first .. first + T - 1`.
        k: unrotated keys of at least `first + T` tokens.
        first: the first query's token.
        search: with at most four spans, which are kept in registers.
        anchors: int32 `[B, Hkv, G, T, S]` or of that many, without gaps, where the spans' anchors are written (0 where
            there is no span); None: they are not wanted.

    Returns:
        `(scores, lo, hi, order)`: scores float32, first and last keys int32, `[B, Hkv, G, T, S]` (-inf, and lo > hi,
        where there is no span), best first. With `gate="joint"` no key is in two spans of a query. Order int64
        `[B * Hkv, G * T * S]`: all rows of a KV head, numbered through, sorted by where their span begins.
    """
    batch, heads, count, dim = q.shape
    group = heads // k.heads
    n = first + count
    steps = search.steps(n, q.device)
    at = torch.arange(first + 1, n + 1, dtype=torch.int32, device=q.device)
    counts = torch.searchsorted(steps, at, right=True, out_int32=True)
    shape = (batch, k.heads, group, count, search.spans)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    lo, hi = (
        torch.empty(shape, dtype=torch.int32, device=q.device),
        torch.empty(shape, dtype=torch.int32, device=q.device),
    )
    bands = _bands(first, n, group * search.spans, search)
    narrow = batch * k.heads * (bands + 2) * (n + 1) < 2**31
    keys = torch.empty(shape, dtype=torch.int32 if narrow else torch.int64, device=q.device)
    rows, table, codes, scales, *strides = k.arguments()
    search_kernel[(count, k.heads, batch)](
        q, rows, table, codes, scales, steps, counts, scores, lo, hi, keys,
        lo if anchors is None else anchors,
        q.stride(0), q.stride(1), q.stride(2), *strides,
        first, search.window, search.sinks, n + 1, triton.cdiv(count, bands),
        G=group, B_G=max(16, triton.next_power_of_2(group)), D=dim, B_D=max(16, triton.next_power_of_2(dim)), B_A=64,
        SPANS=search.spans, BACKWARD=search.backward, FORWARD=search.forward, SPAN_POWER=search.span_power,
        JOINT=search.gate == "joint", SHARED=search.share == "group", KIND=k.kind, SHIFT=k.shift,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", ANCHORS=anchors is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    order = torch.sort(keys.flatten()).indices.view(batch * k.heads, -1)
    return scores, lo, hi, order


def _bands(first: int, n: int, rows: int, search: Search) -> int:
    """Return into how many bands of queries rows are sorted.

    Within a tile, spans begin up to n / (tiles of a band) keys apart, and differ in length as the queries of a band do:
    more bands make the one wider, the other narrower.

    Args:
        first: the first query's token.
        n: keys that the last query sees.
        rows: of each query and KV head.
        search: its options.
    """
    apart = n / max(1.0, rows * (n - first) / 128)
    longer = search.longest(n) - search.longest(first + 1)
    return max(1, min(16, round(math.sqrt(longer / apart))))


@triton.jit
def merge_kernel(
    p_near, p_near_lse, p_span, p_span_lse, p_score,
    rows,
    SPANS: tl.constexpr, JOINT: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr, B_T: tl.constexpr,
):  # fmt: skip
    """Merge what is near with the spans of a query, B_T rows (query heads of queries) a program."""
    o_t, o_dv = tl.program_id(0).to(tl.int64) * B_T + tl.arange(0, B_T), tl.arange(0, B_DV)
    m_t = o_t < rows
    m = m_t[:, None] & (o_dv < DV)[None, :]
    b_near_lse = tl.load(p_near_lse + o_t, mask=m_t, other=float("-inf"))
    b_near = tl.load(p_near + o_t[:, None] * DV + o_dv[None, :], mask=m, other=0.0).to(tl.float32)
    if JOINT:
        b_top = b_near_lse
        for j in tl.static_range(SPANS):
            b_top = tl.maximum(b_top, tl.load(p_span_lse + o_t * SPANS + j, mask=m_t, other=float("-inf")))
        b_total = tl.exp(b_near_lse - b_top)
        b_out = b_near * b_total[:, None]
        for j in tl.static_range(SPANS):
            b_w = tl.exp(tl.load(p_span_lse + o_t * SPANS + j, mask=m_t, other=float("-inf")) - b_top)
            p = p_span + (o_t * SPANS + j)[:, None] * DV + o_dv[None, :]
            b_out += b_w[:, None] * tl.load(p, mask=m, other=0.0).to(tl.float32)
            b_total += b_w
        b_out = b_out / b_total[:, None]
    else:
        b_top = tl.full([B_T], float("-inf"), tl.float32)
        for j in tl.static_range(SPANS):
            b_top = tl.maximum(b_top, tl.load(p_score + o_t * SPANS + j, mask=m_t, other=float("-inf")))
        m_some = b_top > float("-inf")
        b_base = tl.where(m_some, b_top, 0.0)
        b_out = tl.zeros([B_T, B_DV], tl.float32)
        b_total = tl.zeros([B_T], tl.float32)
        for j in tl.static_range(SPANS):
            b_gate = tl.exp(tl.load(p_score + o_t * SPANS + j, mask=m_t, other=float("-inf")) - b_base)
            b_lse = tl.load(p_span_lse + o_t * SPANS + j, mask=m_t, other=float("-inf"))
            b_max = tl.maximum(b_lse, b_near_lse)
            b_w, b_v = tl.exp(b_lse - b_max), tl.exp(b_near_lse - b_max)
            p = p_span + (o_t * SPANS + j)[:, None] * DV + o_dv[None, :]
            b_x = tl.load(p, mask=m, other=0.0).to(tl.float32)
            b_out += (b_gate / (b_w + b_v))[:, None] * (b_w[:, None] * b_x + b_v[:, None] * b_near)
            b_total += b_gate
        b_out = tl.where(m_some[:, None], b_out / b_total[:, None], b_near)
    tl.store(p_near + o_t[:, None] * DV + o_dv[None, :], b_out.to(p_near.dtype.element_ty), mask=m)


def merge(near: Tensor, near_lse: Tensor, spans: Tensor, span_lse: Tensor, scores: Tensor, *, joint: bool) -> Tensor:
    """Merge the attention to what is near with that to each span.

    Args:
        near: `[B, Hq, T, Dv]`, without gaps; the result takes its place.
        near_lse: float32 `[B, Hq, T]`.
        spans: `[B, Hkv, G, T, S, Dv]` or of that many rows, without gaps; 0 for an empty span.
        span_lse: float32, as many; -inf for an empty span.
        scores: float32, as many: search scores, -inf where there is no span.
        joint: whether all keys are in one softmax; else spans are weighed by their scores.

    Returns:
        `near`, with the result.
    """
    batch, heads, count, value_dim = near.shape
    assert near.is_contiguous() and near_lse.is_contiguous() and spans.is_contiguous() and span_lse.is_contiguous()
    rows = batch * heads * count
    block = 16
    options: dict[str, Any] = {"DV": value_dim, "B_DV": max(16, triton.next_power_of_2(value_dim)), "B_T": block}
    merge_kernel[(triton.cdiv(rows, block),)](
        near, near_lse, spans, span_lse, scores, rows,
        SPANS=scores.shape[-1], JOINT=joint, **options, num_warps=4,
    )  # fmt: skip
    return near
