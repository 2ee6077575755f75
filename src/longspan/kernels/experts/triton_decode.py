"""Experts of a few tokens as two Triton kernels: what takes the time is reading the chosen experts' weights once.

1. `_up_kernel`: a program has some rows of one chosen expert's first matrix, or of the shared expert's. Where logits
   are given it chooses the experts itself, which is cheaper than a launch. It writes activations, weighted.
2. `_down_kernel`: a program has some rows of the output, and reads these rows of every chosen expert's second matrix,
   one expert after the other: the sum has one order, and nothing is left to be added.

On Hopper a kernel starts before the one before it has ended (programmatic dependent launch); the shared expert's
weights, which nobody chooses, are read before that is waited for. Each token reads its experts by itself: for more
than a few tokens `triton_prefill` reads less. Nothing waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.experts.reference import Routing, is_gated
from longspan.kernels.experts.triton_kernels import chosen, constants, route
from longspan.kernels.experts.triton_prefill import activated
from longspan.kernels.tiles import hopper


@dataclass(frozen=True)
class Cut:
    """Rows that a program of each kernel has, the most columns it reads at once, and its warps.

    `apart`: whether a kernel of its own chooses experts by logits, instead of every program.
    """

    up_rows: int = 8
    up_columns: int = 4096
    up_warps: int = 4
    down_rows: int = 2
    down_columns: int = 4096
    down_warps: int = 4
    apart: bool = False


@triton.jit
def _up_kernel(
    p_x, p_up, p_shared, p_ids, p_weights, p_logits, p_bias, p_hidden,
    s_x, s_expert, s_up, s_shared, s_logits, s_hidden, scale,
    K: tl.constexpr, INNER: tl.constexpr, SHARED: tl.constexpr, B_R: tl.constexpr, B_K: tl.constexpr,
    RELU2: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, ROUTE: tl.constexpr, EARLY: tl.constexpr,
    E: tl.constexpr, B_E: tl.constexpr, B_TOP: tl.constexpr, TOP: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    i_block, i_t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    shared_blocks: tl.constexpr = (SHARED + B_R - 1) // B_R
    blocks: tl.constexpr = (INNER + B_R - 1) // B_R
    o_k = tl.arange(0, B_K)
    b_weight = 1.0
    if i_block < shared_blocks:
        o_r = i_block * B_R + tl.arange(0, B_R)
        m_r = o_r < SHARED
        o_hidden = TOP * INNER + o_r
        p_rows, s_row, ahead = p_shared, s_shared, s_shared * SHARED
    else:
        if EARLY:
            gdc_wait()
        i_slot = (i_block - shared_blocks) // blocks
        o_r = (i_block - shared_blocks) % blocks * B_R + tl.arange(0, B_R)
        m_r = o_r < INNER
        o_hidden = i_slot * INNER + o_r
        if ROUTE:
            o_e, o_top = tl.arange(0, B_E), tl.arange(0, B_TOP)
            b_logits = tl.load(p_logits + i_t * s_logits + o_e, mask=o_e < E, other=0.0).to(tl.float32)
            b_bias = tl.load(p_bias + o_e, mask=o_e < E, other=0.0).to(tl.float32) if BIAS else 0.0
            b_ids, b_weights = chosen(
                b_logits[None, :], b_bias, o_e,
                E, 1, B_E, B_TOP, TOP, GROUPS, TOP_GROUPS, NORMALISE, SOFTMAX, BIAS, scale,
            )  # fmt: skip
            m_slot = (o_top == i_slot)[None, :]
            i_expert = tl.sum(tl.sum(tl.where(m_slot, b_ids, 0), 1), 0)
            b_weight = tl.sum(tl.sum(tl.where(m_slot, b_weights, 0.0), 1), 0)
            if i_block == shared_blocks + i_slot * blocks:
                tl.store(p_ids + i_t * TOP + i_slot, i_expert)
        else:
            i_expert = tl.load(p_ids + i_t * TOP + i_slot).to(tl.int32)
            b_weight = tl.load(p_weights + i_t * TOP + i_slot).to(tl.float32)
        p_rows, s_row, ahead = p_up + i_expert.to(tl.int64) * s_expert, s_up, s_up * INNER
    p_ws = p_rows + o_r.to(tl.int64)[:, None] * s_row + o_k[None, :]
    p_more = p_ws + (ahead if GATED else 0)
    m = m_r[:, None] & (o_k < K)[None, :]
    b_w = tl.load(p_ws, mask=m, other=0.0, eviction_policy="evict_first")  # [B_R, B_K]
    b_m = tl.load(p_more, mask=m, other=0.0, eviction_policy="evict_first") if GATED else b_w
    if EARLY:
        gdc_wait()
    b_sum = tl.zeros([B_R], tl.float32)
    b_more = tl.zeros([B_R], tl.float32)
    for k in tl.static_range(0, K, B_K):
        if k > 0:
            m = m_r[:, None] & (k + o_k < K)[None, :]
            b_w = tl.load(p_ws + k, mask=m, other=0.0, eviction_policy="evict_first")
            b_m = tl.load(p_more + k, mask=m, other=0.0, eviction_policy="evict_first") if GATED else b_w
        b_x = tl.load(p_x + i_t * s_x + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_w.to(tl.float32) * b_x[None, :], 1)
        if GATED:
            b_more += tl.sum(b_m.to(tl.float32) * b_x[None, :], 1)
    b_hidden = activated(b_sum, b_more, RELU2, SILU, GATED) * b_weight
    tl.store(p_hidden + i_t * s_hidden + o_hidden, b_hidden.to(p_hidden.dtype.element_ty), mask=m_r)


@triton.jit
def _down_kernel(
    p_hidden, p_down, p_shared, p_ids, p_residual, p_out,
    s_hidden, s_expert, s_down, s_shared, s_residual,
    D: tl.constexpr, INNER: tl.constexpr, SHARED: tl.constexpr, TOP: tl.constexpr,
    B_R: tl.constexpr, B_K: tl.constexpr, B_S: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    i_t = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * B_R + tl.arange(0, B_R)
    m_r = o_r < D
    o_row = o_r.to(tl.int64)[:, None]
    p_hidden += i_t * s_hidden
    b_out = tl.zeros([B_R], tl.float32)
    if SHARED > 0:
        o_s = tl.arange(0, B_S)
        p_ws = p_shared + o_row * s_shared + o_s[None, :]
        b_w = tl.load(p_ws, mask=m_r[:, None] & (o_s < SHARED)[None, :], other=0.0, eviction_policy="evict_first")
        if EARLY:
            gdc_wait()
        for k in tl.static_range(0, SHARED, B_S):
            m_k = k + o_s < SHARED
            if k > 0:
                b_w = tl.load(p_ws + k, mask=m_r[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
            b_h = tl.load(p_hidden + TOP * INNER + k + o_s, mask=m_k, other=0.0).to(tl.float32)
            b_out += tl.sum(b_w.to(tl.float32) * b_h[None, :], 1)
    elif EARLY:
        gdc_wait()
    o_k = tl.arange(0, B_K)
    b_sum = tl.zeros([B_R, B_K], tl.float32)
    for i_slot in tl.static_range(TOP):
        i_expert = tl.load(p_ids + i_t * TOP + i_slot).to(tl.int64)
        p_ws = p_down + i_expert * s_expert + o_row * s_down + o_k[None, :]
        for k in tl.static_range(0, INNER, B_K):
            m_k = k + o_k < INNER
            b_w = tl.load(p_ws + k, mask=m_r[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first")
            b_h = tl.load(p_hidden + i_slot * INNER + k + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_sum += b_w.to(tl.float32) * b_h[None, :]
    b_out += tl.sum(b_sum, 1)
    if RESIDUAL:
        b_out += tl.load(p_residual + i_t * s_residual + o_r, mask=m_r, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * D + o_r, b_out.to(p_out.dtype.element_ty), mask=m_r)


def experts(
    x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *,
    activation: str = "relu2", shared: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None,
    cut: Cut | None = None, early: bool | None = None,
) -> Tensor:  # fmt: skip
    """Sum what experts make of tokens; see `reference.experts`, and beyond it:

    Args:
        x: as there, and so on.
        up: as there.
        down: as there.
        ids: as there.
        weights: as there.
        activation: as there.
        shared: as there.
        residual: as there.
        cut: how; None: the usual.
        early: whether kernels start before the ones before them have ended; weights must be older than these. None: on
            Hopper.
    """
    chosen_by = (ids.contiguous(), weights.contiguous(), x, None, Routing(ids.shape[1]))
    return _experts(x, up, down, chosen_by, activation, shared, residual, cut, early)


def mixture(
    x: Tensor, logits: Tensor, bias: Tensor | None, up: Tensor, down: Tensor, *, routing: Routing,
    activation: str = "relu2", shared: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None,
    cut: Cut | None = None, early: bool | None = None,
) -> Tensor:  # fmt: skip
    """Choose experts by logits `[T, E]` and sum what they make of tokens: `route` and `experts` in two launches.

    Args:
        x: as in `reference.experts`.
        logits: as in `reference.route`.
        bias: as there.
        up: as in `reference.experts`.
        down: as there.
        routing: as in `reference.route`.
        activation: as in `reference.experts`.
        shared: as there.
        residual: as there.
        cut: as in `experts`.
        early: as there.
    """
    if cut is not None and cut.apart:
        chosen_by = (*route(logits, bias, routing, early=early), x, None, routing)
        return _experts(x, up, down, chosen_by, activation, shared, residual, cut, early)
    routing.check(logits.shape[1])
    ids = torch.empty(x.shape[0], routing.top, dtype=torch.int32, device=x.device)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return _experts(x, up, down, (ids, None, logits, bias, routing), activation, shared, residual, cut, early)


def _experts(
    x: Tensor, up: Tensor, down: Tensor, chosen_by: tuple[Tensor, Tensor | None, Tensor, Tensor | None, Routing],
    activation: str, shared: tuple[Tensor, Tensor] | None, residual: Tensor | None, cut: Cut | None, early: bool | None,
) -> Tensor:  # fmt: skip
    ids, weights, logits, bias, routing = chosen_by
    gated, inner = is_gated(up, down), down.shape[2]
    tokens, depth = x.shape
    cut = cut or Cut(up_rows=4 if gated else 8)
    early = hopper(x.device) if early is None else early
    x = x if x.stride(-1) == 1 else x.contiguous()
    shared_up, shared_down = shared or (up[0], down[0])
    besides = shared_down.shape[1] if shared else 0
    assert all(w.stride(-1) == 1 for w in (up, down, shared_up, shared_down)), "weights of a row lie together"
    if residual is not None and residual.stride(-1) != 1:
        residual = residual.contiguous()
    hidden = torch.empty(tokens, routing.top * inner + besides, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, depth, dtype=x.dtype, device=x.device)
    launch = {"launch_pdl": True} if early else {}
    blocks = triton.cdiv(besides, cut.up_rows) + routing.top * triton.cdiv(inner, cut.up_rows)
    _up_kernel[(blocks, tokens)](
        x, up, shared_up, ids, hidden if weights is None else weights, logits, logits if bias is None else bias, hidden,
        x.stride(0), up.stride(0), up.stride(1), shared_up.stride(0), logits.stride(0), hidden.stride(0), routing.scale,
        K=depth, INNER=inner, SHARED=besides, B_R=cut.up_rows, B_K=_block(depth, cut.up_columns),
        RELU2=activation == "relu2", SILU=activation == "silu", GATED=gated, ROUTE=weights is None, EARLY=early,
        **constants(routing, up.shape[0], bias), num_warps=cut.up_warps, **launch,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(depth, cut.down_rows), tokens)](
        hidden, down, shared_down, ids, out if residual is None else residual, out,
        hidden.stride(0), down.stride(0), down.stride(1), shared_down.stride(0),
        0 if residual is None else residual.stride(0),
        D=depth, INNER=inner, SHARED=besides, TOP=routing.top,
        B_R=cut.down_rows, B_K=_block(inner, cut.down_columns), B_S=_block(besides or 1, cut.down_columns),
        RESIDUAL=residual is not None, EARLY=early, num_warps=cut.down_warps, **launch,
    )  # fmt: skip
    return out


def _block(size: int, most: int) -> int:
    return min(most, int(triton.next_power_of_2(size)))
