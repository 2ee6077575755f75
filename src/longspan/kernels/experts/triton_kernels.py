"""Routing, sorting of rows by expert, and the sum over a token's experts, as Triton kernels.

Nothing waits for the host and every size is known beforehand: rows are laid out expert after expert, each expert's
padded to whole tiles, so that there is a bound of the rows, and the number of tiles that are used is read on the
device. Rows of an expert stand in the order of their tokens and nothing is added atomically: two runs are equal.
It does not know the products between (`triton_prefill.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.experts.reference import Routing
from longspan.kernels.tiles import hopper

_PAIRS = 1024
"""Pairs of a token and an expert that a program sorts."""
_FEW = 64
"""Tokens up to which each is routed by a warp alone."""
_WORST = tl.constexpr(-3.0e38)


@triton.jit
def chosen(
    b_logits, b_bias, o_e,
    E: tl.constexpr, B_T: tl.constexpr, B_E: tl.constexpr, B_TOP: tl.constexpr, TOP: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr, SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr, scale,
):  # fmt: skip
    """Return the experts of each row of logits [B_T, B_E], and their weights, as the first columns of [B_T, B_TOP]."""
    m_e = (o_e < E)[None, :]
    if SOFTMAX:
        b_logits = tl.where(m_e, b_logits, float("-inf"))
        b_score = tl.exp(b_logits - tl.max(b_logits, 1)[:, None])
        b_score = b_score / tl.sum(b_score, 1)[:, None]
    else:
        b_score = tl.sigmoid(b_logits)
    b_choice = b_score
    if BIAS:
        b_choice += b_bias[None, :]
    b_choice = tl.where(b_choice > _WORST, b_choice, _WORST)  # NaN too
    b_choice = tl.where(m_e, b_choice, float("-inf"))
    if GROUPS > 1:
        each: tl.constexpr = E // GROUPS
        o_group = o_e // each
        b_best = tl.full([B_T, B_E], float("-inf"), tl.float32)  # of its group, in the column of the group's number
        for i_group in tl.static_range(GROUPS):
            b_of = tl.where((o_group == i_group)[None, :], b_choice, float("-inf"))
            b_first, o_first = tl.max(b_of, 1, return_indices=True)
            b_second = tl.max(tl.where(o_e[None, :] == o_first[:, None], float("-inf"), b_of), 1)
            b_best = tl.where((o_e == i_group)[None, :], (b_first + b_second)[:, None], b_best)
        m_in = tl.zeros([B_T, B_E], tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            _, o_best = tl.max(b_best, 1, return_indices=True)
            m_in = m_in | (o_group[None, :] == o_best[:, None])
            b_best = tl.where(o_e[None, :] == o_best[:, None], float("-inf"), b_best)
        b_choice = tl.where(m_in & m_e, b_choice, float("-inf"))
    o_top = tl.arange(0, B_TOP)
    b_ids = tl.zeros([B_T, B_TOP], tl.int32)
    for i_top in tl.static_range(TOP):
        _, o_best = tl.max(b_choice, 1, return_indices=True)  # of equals the first
        b_choice = tl.where(o_e[None, :] == o_best[:, None], float("-inf"), b_choice)
        b_ids = tl.where((o_top == i_top)[None, :], o_best[:, None], b_ids)
    b_weights = tl.where((o_top < TOP)[None, :], tl.gather(b_score, b_ids, 1), 0.0)
    if NORMALISE:
        b_weights = b_weights / (tl.sum(b_weights, 1)[:, None] + 1e-20)
    return b_ids, b_weights * scale


@triton.jit
def _route_kernel(
    p_logits, p_bias, p_ids, p_weights, tokens, s_logits, scale,
    E: tl.constexpr, B_T: tl.constexpr, B_E: tl.constexpr, B_TOP: tl.constexpr, TOP: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, NORMALISE: tl.constexpr, SOFTMAX: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    o_t = tl.program_id(0).to(tl.int64) * B_T + tl.arange(0, B_T)
    o_e, o_top = tl.arange(0, B_E), tl.arange(0, B_TOP)
    m_t = (o_t < tokens)[:, None]
    b_logits = tl.load(p_logits + o_t[:, None] * s_logits + o_e[None, :], mask=m_t & (o_e < E)[None, :], other=0.0)
    b_bias = tl.load(p_bias + o_e, mask=o_e < E, other=0.0).to(tl.float32) if BIAS else 0.0
    b_ids, b_weights = chosen(
        b_logits.to(tl.float32), b_bias, o_e,
        E, B_T, B_E, B_TOP, TOP, GROUPS, TOP_GROUPS, NORMALISE, SOFTMAX, BIAS, scale,
    )  # fmt: skip
    m = m_t & (o_top < TOP)[None, :]
    tl.store(p_ids + o_t[:, None] * TOP + o_top[None, :], b_ids, mask=m)
    tl.store(p_weights + o_t[:, None] * TOP + o_top[None, :], b_weights, mask=m)


def constants(routing: Routing, experts: int, bias: Tensor | None) -> dict[str, int | bool]:
    """Return what `chosen` is compiled for."""
    return {
        "E": experts, "B_E": max(2, triton.next_power_of_2(experts)), "TOP": routing.top,
        "B_TOP": triton.next_power_of_2(routing.top), "GROUPS": routing.groups, "TOP_GROUPS": routing.top_groups,
        "NORMALISE": routing.normalise, "SOFTMAX": routing.scores == "softmax", "BIAS": bias is not None,
    }  # fmt: skip


def route(logits: Tensor, bias: Tensor | None, routing: Routing, *, early: bool | None = None) -> tuple[Tensor, Tensor]:
    """Choose experts; see `reference.route`, and beyond it:

    Args:
        logits: as there.
        bias: as there.
        routing: as there.
        early: whether the kernel starts before the one before it has ended; None: on Hopper.
    """
    tokens, number = logits.shape
    routing.check(number)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    ids = torch.empty(tokens, routing.top, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, routing.top, dtype=torch.float32, device=logits.device)
    sizes = constants(routing, number, bias)
    block = 1 if tokens <= _FEW else max(1, 2048 // int(sizes["B_E"]))
    early = hopper(logits.device) if early is None else early
    _route_kernel[(triton.cdiv(tokens, block),)](
        logits, logits if bias is None else bias, ids, weights, tokens, logits.stride(0), routing.scale,
        B_T=block, EARLY=early, **sizes, num_warps=1 if tokens <= _FEW else 4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return ids, weights


@triton.jit
def _count_kernel(p_ids, p_counts, pairs, E: tl.constexpr, B_E: tl.constexpr, PAIRS: tl.constexpr, B_P: tl.constexpr):
    """Count the pairs of each expert among those of a program."""
    i_block = tl.program_id(0)
    o_e = tl.arange(0, B_E)
    b_count = tl.zeros([B_E], tl.int32)
    for p in range(0, PAIRS, B_P):
        o_p = i_block * PAIRS + p + tl.arange(0, B_P)
        b_id = tl.load(p_ids + o_p, mask=o_p < pairs, other=E).to(tl.int32)
        b_count += tl.sum((b_id[:, None] == o_e[None, :]).to(tl.int32), 0)
    tl.store(p_counts + i_block * E + o_e, b_count, mask=o_e < E)


@triton.jit
def _offsets_kernel(
    p_counts, p_expert, p_tiles, blocks, most, E: tl.constexpr, B_E: tl.constexpr, B_B: tl.constexpr, PAD: tl.constexpr
):
    """Replace counts by where each program's first row of each expert goes; list the experts of tiles."""
    o_e, o_b = tl.arange(0, B_E), tl.arange(0, B_B)
    m_e = (o_e < E)[None, :]
    b_total = tl.zeros([B_E], tl.int32)
    for i in range(0, blocks, B_B):
        m = (i + o_b < blocks)[:, None] & m_e
        b_total += tl.sum(tl.load(p_counts + (i + o_b)[:, None] * E + o_e[None, :], mask=m, other=0), 0)
    b_padded = tl.cdiv(b_total, PAD) * PAD
    b_end = tl.cumsum(b_padded, 0)
    b_next = b_end - b_padded
    for i in range(0, blocks, B_B):
        m = (i + o_b < blocks)[:, None] & m_e
        p = p_counts + (i + o_b)[:, None] * E + o_e[None, :]
        b_count = tl.load(p, mask=m, other=0)
        tl.store(p, b_next[None, :] + tl.cumsum(b_count, 0) - b_count, mask=m)
        b_next += tl.sum(b_count, 0)
    tl.store(p_tiles, tl.sum(b_padded, 0) // PAD)
    for i in range(0, most, B_B):
        b_expert = tl.sum(((b_end[None, :] <= ((i + o_b) * PAD)[:, None]) & m_e).to(tl.int32), 1)
        tl.store(p_expert + i + o_b, tl.minimum(b_expert, E - 1), mask=i + o_b < most)


@triton.jit
def _place_kernel(
    p_ids, p_first, p_place, pairs,
    E: tl.constexpr, B_E: tl.constexpr, PAIRS: tl.constexpr, B_P: tl.constexpr,
):  # fmt: skip
    """Tell each pair the row it has."""
    i_block = tl.program_id(0)
    o_e, o_b = tl.arange(0, B_E), tl.arange(0, B_P)
    b_before = (o_b[None, :] < o_b[:, None]).to(tl.float16)  # [B_P, B_P]
    b_next = tl.load(p_first + i_block * E + o_e, mask=o_e < E, other=0)
    for p in range(0, PAIRS, B_P):
        o_p = i_block * PAIRS + p + o_b
        m_p = o_p < pairs
        b_id = tl.load(p_ids + o_p, mask=m_p, other=E).to(tl.int32)
        m_one = b_id[:, None] == o_e[None, :]  # [B_P, B_E]
        b_rank = tl.dot(b_before, m_one.to(tl.float16)).to(tl.int32)  # small counts: exact
        b_place = tl.sum(tl.where(m_one, b_next[None, :] + b_rank, 0), 1)
        b_next += tl.sum(m_one.to(tl.int32), 0)
        tl.store(p_place + o_p, b_place, mask=m_p)


@dataclass(frozen=True)
class Layout:
    """Pairs of a token and an expert as rows, expert after expert, each expert's in the order of tokens.

    Attributes:
        place: int32 `[T, top]`, the row of each pair.
        expert: int32 `[capacity / pad]`, the expert of each tile of `pad` rows.
        tiles: int32 `[1]`, the tiles that there are.
        pad: rows of a tile.
    """

    place: Tensor
    expert: Tensor
    tiles: Tensor
    pad: int

    @property
    def capacity(self) -> int:
        """Rows that there may be at most, padding included."""
        return self.expert.shape[0] * self.pad

    @classmethod
    def of(cls, ids: Tensor, experts: int, pad: int) -> Layout:
        """Lay out the pairs of `ids` `[T, top]`, by counting, on the device."""
        pairs, device = ids.numel(), ids.device
        ids = ids.contiguous()
        most = min(triton.cdiv(pairs, pad) + experts, pairs)  # each pair may be alone
        blocks = triton.cdiv(pairs, _PAIRS)
        counts = torch.empty(blocks, experts, dtype=torch.int32, device=device)
        place = torch.empty(ids.shape, dtype=torch.int32, device=device)
        expert = torch.empty(most, dtype=torch.int32, device=device)
        tiles = torch.empty(1, dtype=torch.int32, device=device)
        block_e = max(16, triton.next_power_of_2(experts))
        block = max(16, min(64, 8192 // block_e))
        sizes = {"E": experts, "B_E": block_e, "PAIRS": _PAIRS, "B_P": block}
        _count_kernel[(blocks,)](ids, counts, pairs, **sizes)
        _offsets_kernel[(1,)](counts, expert, tiles, blocks, most, E=experts, B_E=block_e, B_B=block, PAD=pad)
        _place_kernel[(blocks,)](ids, counts, place, pairs, **sizes)
        return cls(place, expert, tiles, pad)


@triton.jit
def _spread_kernel(p_x, p_place, p_out, s_x, D: tl.constexpr, B_D: tl.constexpr, TOP: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    b_x = tl.load(p_x + i_t * s_x + o_d, mask=o_d < D, other=0.0)
    for i_top in tl.static_range(TOP):
        i_row = tl.load(p_place + i_t * TOP + i_top).to(tl.int64)
        tl.store(p_out + i_row * D + o_d, b_x, mask=o_d < D)


def spread(x: Tensor, layout: Layout) -> Tensor:
    """Return the rows of x `[T, d]` where the layout has them, `[capacity, d]`; padding is not written."""
    tokens, dim = x.shape
    out = torch.empty(layout.capacity, dim, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(dim))
    _spread_kernel[(tokens, triton.cdiv(dim, block))](
        x, layout.place, out, x.stride(0), D=dim, B_D=block, TOP=layout.place.shape[1]
    )
    return out


@triton.jit
def _gather_kernel(
    p_y, p_place, p_weights, p_base, p_out, s_base,
    D: tl.constexpr, B_D: tl.constexpr, TOP: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * B_D + tl.arange(0, B_D)
    b_sum = tl.zeros([B_D], tl.float32)
    for i_top in tl.static_range(TOP):
        i_row = tl.load(p_place + i_t * TOP + i_top).to(tl.int64)
        b_weight = tl.load(p_weights + i_t * TOP + i_top).to(tl.float32)
        b_sum += tl.load(p_y + i_row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32) * b_weight
    if BASE:
        b_sum += tl.load(p_base + i_t * s_base + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    tl.store(p_out + i_t * D + o_d, b_sum.to(p_out.dtype.element_ty), mask=o_d < D)


def gathered(y: Tensor, layout: Layout, weights: Tensor, base: Tensor | None, out: Tensor) -> Tensor:
    """Write to out `[T, d]` the weighted sum of every token's rows of y `[capacity, d]`, and base `[T, d]`."""
    tokens, dim = out.shape
    block = min(1024, triton.next_power_of_2(dim))
    _gather_kernel[(tokens, triton.cdiv(dim, block))](
        y, layout.place, weights.contiguous(), out if base is None else base, out,
        0 if base is None else base.stride(0), D=dim, B_D=block, TOP=layout.place.shape[1], BASE=base is not None,
    )  # fmt: skip
    return out
