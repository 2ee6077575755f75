"""Causal attention to a sliding window as one Triton kernel (Ampere and later).

FlashAttention-2 (arXiv 2307.08691, algorithm 1) over the window alone. A program takes `BLOCK_R` rows of one KV head. A
row is one query of one of the group's heads, and a query's heads are neighbours: a tile of 128 rows of 16 heads stands
at 8 positions and reads hardly more than one window. Blocks of keys that every row sees are computed without a mask;
only those at the window's two edges have one. Exponents are of base 2, with `log2(e)` in the scale. Float32 inputs are
multiplied as three TF32 products, half types directly; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.engine import can_copy, described
from longspan.kernels.tiles import Tile, hopper, roomy
from longspan.kernels.window_attention import spans

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))


def forward_tile(dtype: torch.dtype, dim: int, roomy: bool) -> Tile:
    """Return the tile for keys of this type and head size, on a chip with much shared memory or with little."""
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1) if dim > 128 else Tile(32, 16, 4, 2) if dim > 64 else Tile(64, 32, 4, 2)
    if dim > 128:
        return Tile(128, 32, 8, 2) if roomy else Tile(64, 32, 8, 2)
    if dim > 64:
        return Tile(128, 64, 8, 3) if roomy else Tile(128, 64, 8, 2)
    return Tile(128, 128, 8, 3) if roomy else Tile(128, 64, 4, 3)


@triton.jit
def _walk(
    b_q, b_max, b_sum, b_out, b_lost, b_at,
    p_k, p_v, k_row, v_row, s_k_token, s_v_token, start, left, edge, blocks, stop, window, scale,
    D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """Take blocks of keys into the online softmax: `left` from `start` on, the others from `edge` on.

    Where copies are the engine's (TMA), `p_k` and `p_v` describe keys and values, of which this head's first is the row
    `k_row` and `v_row`.
    """
    o_n, o_d, o_dv = tl.arange(0, BLOCK_N), tl.arange(0, B_D), tl.arange(0, B_DV)
    o_keys = o_n[None, :] * s_k_token + o_d[:, None]
    o_values = o_n[:, None] * s_v_token + o_dv[None, :]
    for i in range(blocks):
        n = tl.where(i < left, start, edge - left * BLOCK_N) + i * BLOCK_N if MASKED else start + i * BLOCK_N
        if TMA:
            b_k, b_v = tl.trans(p_k.load([k_row + n, 0])), p_v.load([v_row + n, 0])  # [B_D, BLOCK_N], [BLOCK_N, B_DV]
        else:
            p_keys, p_values = p_k + n.to(tl.int64) * s_k_token + o_keys, p_v + n.to(tl.int64) * s_v_token + o_values
            m_k, m_v = (o_d < D)[:, None], (o_dv < DV)[None, :]
            if MASKED:
                m_k, m_v = m_k & (n + o_n < stop)[None, :], m_v & (n + o_n < stop)[:, None]
            b_k = tl.load(p_keys, mask=m_k, other=0.0) if MASKED or D != B_D else tl.load(p_keys)
            b_v = tl.load(p_values, mask=m_v, other=0.0) if MASKED or DV != B_DV else tl.load(p_values)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK_R, BLOCK_N]
        if MASKED:
            b_behind = b_at[:, None] - n - o_n[None, :]
            m_read = (b_behind >= 0) & (b_behind < window)
            b_s = tl.where(m_read, b_s, float("-inf"))
            if CAREFUL:
                m_lost = 1 - tl.min((tl.abs(b_v) < float("inf")).to(tl.int32), 1)  # [BLOCK_N]; NaN compares false
                b_v = tl.where((m_lost > 0)[:, None], 0.0, b_v)
                b_lost = tl.maximum(b_lost, tl.max(m_read.to(tl.int32) * m_lost[None, :], 1))
        # NaN among the scores is lost in a maximum, not in the sum of the weights.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s * scale - b_base[:, None])
        b_keep = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_keep[:, None], input_precision=PRECISION)
        b_max = b_new
    return b_max, b_sum, b_out, b_lost


@triton.jit(do_not_specialize=["queries", "first", "window"])
def _window_attention_kernel(
    p_q, p_k, p_v, p_out, p_lse,
    s_q_batch, s_q_head, s_q_token, s_k_batch, s_k_head, s_k_token, s_v_batch, s_v_head, s_v_token,
    kv_heads, queries, first, window, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, B_D: tl.constexpr, B_DV: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    i_batch, i_kv = (i_head // kv_heads).to(tl.int64), (i_head % kv_heads).to(tl.int64)
    o_row = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)  # which row of the KV head
    m_row = o_row < queries * G
    o_t, o_head = o_row // G, i_kv * G + o_row % G  # [BLOCK_R] which query and query head
    b_at = first + o_t
    oldest = first + i_tile * BLOCK_R // G  # position of the tile's first query, and of its last
    newest = first + tl.minimum((i_tile * BLOCK_R + BLOCK_R - 1) // G, queries - 1)

    o_d, o_dv = tl.arange(0, B_D), tl.arange(0, B_DV)
    p_rows = p_q + i_batch * s_q_batch + (o_head * s_q_head + o_t.to(tl.int64) * s_q_token)[:, None] + o_d[None, :]
    b_q = tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)  # [BLOCK_R, B_D]
    o_k, o_v = i_batch * s_k_batch + i_kv * s_k_head, i_batch * s_v_batch + i_kv * s_v_head
    k_row, v_row = 0, 0
    if TMA:
        k_row, v_row = (o_k // s_k_token).to(tl.int32), (o_v // s_v_token).to(tl.int32)
    else:
        p_k += o_k
        p_v += o_v
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_out = tl.zeros([BLOCK_R, B_DV], tl.float32)
    b_lost = tl.zeros([BLOCK_R], tl.int32)  # whether the row reads a value that is not finite

    # Every row sees the keys `newest - window + 1 .. oldest`: whole blocks of them, `middle .. edge - 1`, need no mask.
    start, stop = tl.maximum(oldest - window + 1, 0), newest + 1
    left = tl.cdiv(tl.maximum(tl.minimum(newest - window + 1, stop) - start, 0), BLOCK_N)
    middle = start + left * BLOCK_N
    whole = tl.maximum(oldest + 1 - middle, 0) // BLOCK_N
    edge = middle + whole * BLOCK_N
    edges = left + tl.cdiv(tl.maximum(stop - edge, 0), BLOCK_N)
    b_max, b_sum, b_out, b_lost = _walk(
        b_q, b_max, b_sum, b_out, b_lost, b_at, p_k, p_v, k_row, v_row, s_k_token, s_v_token,
        start, left, edge, edges, stop, window, scale, D, DV, B_D, B_DV, BLOCK_N, PRECISION, TMA, True, False,
    )  # fmt: skip
    b_max, b_sum, b_out, b_lost = _walk(
        b_q, b_max, b_sum, b_out, b_lost, b_at, p_k, p_v, k_row, v_row, s_k_token, s_v_token,
        middle, 0, 0, whole, stop, window, scale, D, DV, B_D, B_DV, BLOCK_N, PRECISION, TMA, False, False,
    )  # fmt: skip
    clean = tl.min(tl.min((tl.abs(b_out) <= float("inf")).to(tl.int32), 1), 0)  # NaN compares false
    if clean == 0:
        # A value that is not finite spoils rows that don't read it (0 * NaN): the tile is computed again, with care.
        b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_R], tl.float32)
        b_out = tl.zeros([BLOCK_R, B_DV], tl.float32)
        b_max, b_sum, b_out, b_lost = _walk(
            b_q, b_max, b_sum, b_out, b_lost, b_at, p_k, p_v, k_row, v_row, s_k_token, s_v_token,
            start, 0, start, tl.cdiv(stop - start, BLOCK_N), stop, window, scale,
            D, DV, B_D, B_DV, BLOCK_N, PRECISION, TMA, True, True,
        )  # fmt: skip

    b_sum = tl.where(m_row, b_sum, 1.0)
    b_out = tl.where((b_lost > 0)[:, None], float("nan"), b_out / b_sum[:, None])
    o_out = (i_batch * kv_heads * G + o_head) * queries + o_t
    tl.store(p_lse + o_out, (b_max + tl.log2(b_sum)) * LN_2, mask=m_row)
    p_outs = p_out + o_out[:, None] * DV + o_dv[None, :]
    tl.store(p_outs, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dv < DV)[None, :])


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    engine: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the window; arguments and results as in the reference.

    Queries are brought to the keys' type. All may be views of which only the last axis lies together. `tile` is how the
    kernel is cut; None: as `forward_tile` says. `engine`: whether Hopper's copy engine brings keys and values, where it
    can; None: on Hopper.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = k.shape[1], k.shape[2], v.shape[-1]
    if scale <= 0:
        q, scale = q * scale, 1.0  # the kernel takes the greatest product for the greatest score
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(k.dtype), k, v))
    if tile is None and engine is None and queries and spans.serves(q, k, v, out_dtype or torch.float32):
        return spans.window_attention(q, k, v, window=window, scale=scale, out_dtype=out_dtype or torch.float32)
    out = torch.empty(batch, heads, queries, value_dim, dtype=out_dtype or torch.float32, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = tile or forward_tile(k.dtype, max(dim, value_dim), roomy(k.device))
    group = heads // kv_heads
    engine = (hopper(k.device) if engine is None else engine) and can_copy(k) and can_copy(v)
    _window_attention_kernel[(triton.cdiv(queries * group, tile.rows), batch * kv_heads)](
        q, described(k, tile.keys) if engine else k, described(v, tile.keys) if engine else v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        kv_heads, queries, keys - queries, min(window, keys), scale * LOG2_E,
        G=group, D=dim, DV=value_dim,
        B_D=max(16, triton.next_power_of_2(dim)), B_DV=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_R=tile.rows, BLOCK_N=tile.keys, PRECISION="tf32x3" if k.dtype == torch.float32 else "ieee",
        TMA=engine, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse
