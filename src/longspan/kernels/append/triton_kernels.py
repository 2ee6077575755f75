"""One new token's rows kept, by one Triton kernel: a program a head, query, key or value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.append.reference import Place


@triton.jit
def append_kernel(
    p_rows, p_keys, p_values, p_table, p_rotated, p_freq, p_lengths, p_q_weight, p_k_weight, p_q,
    s_rows, s_keys_head, s_values_head, s_table, s_rotated_sequence, s_rotated_head, eps,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, B_D: tl.constexpr,
    NORM: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Write one head's row where it belongs."""
    i_head, i_sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, B_D)
    m_d = o_d < D
    p_rows += i_sequence * s_rows + i_head * D
    b_x = tl.load(p_rows + o_d, mask=m_d, other=0.0)
    is_q = i_head < Q_HEADS
    is_v = i_head >= Q_HEADS + KV_HEADS
    half: tl.constexpr = ROTARY // 2
    o_other = tl.where(o_d < half, o_d + half, tl.where(o_d < ROTARY, o_d - half, o_d))
    b_other = b_x
    if ROTARY > 0:
        b_other = tl.load(p_rows + o_other, mask=m_d, other=0.0)
    if NORM and not is_v:
        p_weight = p_k_weight
        if is_q:
            p_weight = p_q_weight
        wide = b_x.to(tl.float32)
        root = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        b_x = (wide * root * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)).to(b_x.dtype)
        b_w = tl.load(p_weight + o_other, mask=m_d, other=0.0).to(tl.float32)
        b_other = (b_other.to(tl.float32) * root * b_w).to(b_x.dtype)
    if is_q:
        tl.store(p_q + (i_sequence * Q_HEADS + i_head) * D + o_d, b_x, mask=m_d)
    else:
        n = tl.load(p_lengths + i_sequence)
        row = tl.load(p_table + i_sequence * s_table + n // 64) * 64 + n % 64  # int64: slots times a page pass 2^31
        if is_v:
            p = p_values + (i_head - Q_HEADS - KV_HEADS).to(tl.int64) * s_values_head + row * D
            tl.store(p + o_d, b_x, mask=m_d)
        else:
            head = (i_head - Q_HEADS).to(tl.int64)
            tl.store(p_keys + head * s_keys_head + row * D + o_d, b_x, mask=m_d)
            if ROTARY > 0:
                o_freq = tl.where(o_d < half, o_d, o_d - half)
                b_turns = n.to(tl.float64) * tl.load(p_freq + o_freq, mask=o_d < ROTARY, other=0.0)
                b_angle = ((b_turns - tl.floor(b_turns)) * 6.283185307179586).to(tl.float32)
                b_second = b_other.to(tl.float32)
                b_second = tl.where(o_d < half, -b_second, b_second)
                b_turned = b_x.to(tl.float32) * tl.cos(b_angle) + b_second * tl.sin(b_angle)
                b_turned = tl.where(o_d < ROTARY, b_turned, b_x.to(tl.float32)).to(b_x.dtype)
                p = p_rotated + i_sequence * s_rotated_sequence + head * s_rotated_head + n * D
                tl.store(p + o_d, b_turned, mask=m_d)


def append(
    rows: Tensor,
    place: Place,
    lengths: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Keep one token of every sequence, and return its queries; see `reference.append`."""
    kv_heads, dim = place.keys.shape[0], place.keys.shape[-1]
    batch, heads = rows.shape[0], rows.shape[1] // dim
    assert rows.stride(1) == 1 and place.keys.is_contiguous() and place.values.is_contiguous()
    rotated, freq = place.rotated, place.per_token
    turns = 0 if rotated is None or freq is None else 2 * freq.numel()
    assert rotated is None or rotated.stride()[2:] == (dim, 1), "rotated rows lie together"
    q = torch.empty(batch, heads - 2 * kv_heads, dim, dtype=rows.dtype, device=rows.device)
    append_kernel[(heads, batch)](
        rows, place.keys, place.values, place.table,
        rows if rotated is None else rotated, rows if freq is None else freq, lengths,
        rows if q_weight is None else q_weight, rows if k_weight is None else k_weight, q,
        rows.stride(0), place.keys.stride(0), place.values.stride(0), place.table.stride(0),
        0 if rotated is None else rotated.stride(0), 0 if rotated is None else rotated.stride(1), eps,
        Q_HEADS=heads - 2 * kv_heads, KV_HEADS=kv_heads, D=dim, B_D=triton.next_power_of_2(dim),
        NORM=q_weight is not None, ROTARY=turns, num_warps=1,
    )  # fmt: skip
    return q
