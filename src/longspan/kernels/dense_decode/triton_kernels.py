"""One decode step of dense attention as two Triton kernels, for sequences of different lengths.

Keys are split over programs (flash-decoding), each of which attends to its share with all query heads of a KV head at
once, so that a key is read once; shares are merged by their log-sum-exp. Lengths are read on the device and the grid
does not depend on them, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.held_triton import load_rows
from longspan.kernels.partial_attention.reference import merge_partials
from longspan.kernels.superlinear.triton_decode import _rotated, merge_kernel
from longspan.kernels.tiles import roomy

_LOG2E = 1.4426950408889634
_PROGRAMS, _KEYS = 512, 512
"""Programs of a step (an H200 has 132 multiprocessors), and the keys that each should have: else they are half as many.
Powers of two: the merge takes more than 256 shares much longer."""


@triton.jit
def share_kernel(
    p_q, p_k, p_k_table, p_k_codes, p_k_scales, p_v, p_v_table, p_v_codes, p_v_scales,
    p_lengths, p_freq, p_out, p_lse,
    s_q_sequence, s_q_head,
    s_k_sequence, s_k_head, s_k_slot, s_k_token, s_k_table, k_slots,
    s_v_sequence, s_v_head, s_v_slot, s_v_token, s_v_table, v_slots,
    scale,
    ROTARY: tl.constexpr, HEADS: tl.constexpr, G: tl.constexpr, B_G: tl.constexpr,
    D: tl.constexpr, B_D: tl.constexpr, DV: tl.constexpr, B_DV: tl.constexpr,
    SPLITS: tl.constexpr, B_N: tl.constexpr, STAGES: tl.constexpr,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one share of the keys: outputs `[B, Hq, SPLITS, Dv]`, log-sum-exps in base 2 (-inf: no keys)."""
    i_split, i_head, i_sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.load(p_lengths + i_sequence).to(tl.int32)
    p_q += i_sequence * s_q_sequence
    p_k += i_sequence * s_k_sequence
    p_k_table += i_sequence * s_k_table
    p_v += i_sequence * s_v_sequence
    p_v_table += i_sequence * s_v_table
    o_g, o_d, o_dv = tl.arange(0, B_G), tl.arange(0, B_D), tl.arange(0, B_DV)
    each = tl.cdiv(tl.cdiv(n, B_N), SPLITS) * B_N
    begin = i_split * each
    end = tl.minimum(begin + each, n)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_q = _rotated(p_q, (i_head * G + o_g)[:, None] * s_q_head, o_d[None, :], m_q, p_freq, n - 1, ROTARY, D)
    b_top = tl.full([B_G], float("-inf"), tl.float32)
    b_total = tl.zeros([B_G], tl.float32)
    b_o = tl.zeros([B_G, B_DV], tl.float32)
    for start in tl.range(begin, end, B_N, num_stages=STAGES):
        o_n = start + tl.arange(0, B_N)
        m_n = o_n < end
        b_k = load_rows(
            p_k, p_k_table, p_k_codes, p_k_scales, s_k_head, s_k_slot, s_k_token, k_slots,
            i_head, o_n, m_n, o_d, D, K_KIND, SHIFT,
        )  # fmt: skip
        b_v = load_rows(
            p_v, p_v_table, p_v_codes, p_v_scales, s_v_head, s_v_slot, s_v_token, v_slots,
            i_head, o_n, m_n, o_dv, DV, V_KIND, SHIFT,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION) * scale  # [B_G, B_N], in base 2
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_keep = tl.exp2(b_top - b_new)
        b_total = b_total * b_keep + tl.sum(b_p, 1)
        b_o = b_o * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_top = b_new
    row = (i_sequence * HEADS + i_head * G + o_g) * SPLITS + i_split
    tl.store(p_lse + row, b_top + tl.log2(b_total), mask=o_g < G)
    if begin < end:
        m_o = (o_g < G)[:, None] & (o_dv < DV)[None, :]
        tl.store(p_out + row[:, None] * DV + o_dv[None, :], b_o / b_total[:, None], mask=m_o)


def decode(
    q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, per_token: Tensor | None = None,
    splits: int | None = None, stages: int | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the newest token of every sequence; see `reference.decode`, and beyond it:

    Args:
        q: as there, and so on; its channels lie together.
        k: as there.
        v: as there.
        lengths: as there; on the device.
        scale: as there.
        per_token: as there.
        splits: into how many shares keys are cut; None: as Hopper likes it.
        stages: blocks of keys that are on their way at once; None: as the chip has room for.
    """
    part_out, part_lse = _shares(q, k, v, lengths, scale, per_token, splits, stages)
    sequences, heads, splits, value_dim = part_out.shape
    out = torch.empty(sequences, heads, value_dim, dtype=q.dtype, device=q.device)
    channels, block = min(32, max(16, triton.next_power_of_2(value_dim))), triton.next_power_of_2(splits)
    merge_kernel[(heads, triton.cdiv(value_dim, channels), sequences)](
        part_out, part_lse, part_lse, out, out.stride(0), out.stride(1),
        NEAR=splits, PIECES=1, SPANS=0, JOINT=True,
        DV=value_dim, B_DV=channels, B_P=block, B_CHUNK=min(256, block), EARLY=False, num_warps=4,
    )  # fmt: skip
    return out


def partial(
    q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to a part of each sequence; see `reference.partial` without rotation, and `decode` for `splits`."""
    out, lse = _shares(q, k, v, lengths, scale, None, splits, None)
    return merge_partials(out.movedim(2, 0), lse.movedim(2, 0) / _LOG2E)


def _shares(
    q: Tensor, k: Held, v: Held, lengths: Tensor, scale: float, per_token: Tensor | None,
    splits: int | None, stages: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the outputs of shares of keys, `[B, Hq, SPLITS, Dv]`, and their log-sum-exps in base 2."""
    sequences, heads, dim = q.shape
    group, value_dim = heads // k.heads, v.dim
    assert q.stride(-1) == 1, "channels lie together"
    keys = 64 if max(dim, value_dim) <= 128 and q.dtype != torch.float32 else 32
    if splits is None:
        rows = k.heads * sequences
        programs = _PROGRAMS if k.capacity * rows >= _PROGRAMS * _KEYS else _PROGRAMS // 2
        splits = max(1, min(triton.cdiv(k.capacity, keys), programs // rows, 256))
    if stages is None:
        stages = 3 if roomy(q.device) else 2
    part_out = torch.empty(sequences, heads, splits, value_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=q.device)
    k_rows, k_table, k_codes, k_scales, *k_strides = k.arguments()
    v_rows, v_table, v_codes, v_scales, *v_strides = v.arguments()
    share_kernel[(splits, k.heads, sequences)](
        q, k_rows, k_table, k_codes, k_scales, v_rows, v_table, v_codes, v_scales,
        lengths, part_lse if per_token is None else per_token, part_out, part_lse,
        q.stride(0), q.stride(1), *k_strides, *v_strides, scale * _LOG2E,
        ROTARY=0 if per_token is None else 2 * per_token.numel(), HEADS=heads, G=group,
        B_G=max(16, triton.next_power_of_2(group)),
        D=dim, B_D=max(16, triton.next_power_of_2(dim)),
        DV=value_dim, B_DV=max(16, triton.next_power_of_2(value_dim)),
        SPLITS=splits, B_N=keys, STAGES=stages, K_KIND=k.kind, V_KIND=v.kind, SHIFT=v.shift,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return part_out, part_lse
