"""Mamba-2's scan as Triton kernels (Ampere and later).

1. `_steps_kernel`: time steps, and the running sums of their decays' logarithms within each chunk.
2. `_walk_kernel` without outputs: what each segment of chunks leaves in the state, begun from nothing.
3. `_walk_kernel` with outputs: a program walks the chunks of its segment with the state of one head in registers,
   begun from what the segments before it leave. With one segment the second launch falls away.

README.md says why it is cut so. Products of half types are summed in float32; float32 inputs are multiplied as three
TF32 products. The state stays float32 from token to token: only its copy that C is multiplied with has x's type.
Inputs must be finite: one that is not reaches all outputs of its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.causal_conv.triton_kernels import unit_stride
from longspan.kernels.engine import can_copy_tokens, described_tokens
from longspan.kernels.mamba2.reference import NO_LIMIT
from longspan.kernels.tiles import hopper, roomy

_LOG2_E = tl.constexpr(1.4426950408889634)
_PROGRAMS = 512
"""Programs that are to run: four for each of Hopper's multiprocessors, two at a time."""


@dataclass(frozen=True)
class ScanTile:
    """How a scan is cut."""

    chunk: int
    """Tokens whose products are taken at once."""
    channels: int
    """Channels of a head that one program holds."""
    warps: int
    stages: int
    segments: int = 0
    """Pieces of the sequence that are walked side by side; 0: as many as fill the chip."""


def scan_tile(dtype: torch.dtype, dim: int, size: int, roomy: bool) -> ScanTile:
    """Return the tile for inputs of this type, a head of `dim` channels and states of `size` numbers a channel."""
    channels = max(16, min(64, triton.next_power_of_2(dim)))
    if dtype == torch.float32:
        return ScanTile(32, min(channels, 32), 4, 1)
    if size > 128:
        return ScanTile(64, min(channels, 32), 4, 2) if roomy else ScanTile(32, min(channels, 32), 4, 1)
    return ScanTile(64, channels, 4, 2) if roomy else ScanTile(64, min(channels, 32), 4, 1)


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) with a small relative error, however small it is; x float32 or float64."""
    e = tl.exp(tl.minimum(x, 20.0))
    series = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * 0.25)))
    return tl.where(x > 20.0, x, tl.where(e < 0.03, series, tl.log(1.0 + e)))


@triton.jit
def _steps_kernel(
    p_dt, p_bias, p_a, p_logs, p_since, s_dt_batch, s_dt_token, s_dt_head, tokens, heads, padded, low, high,
    L: tl.constexpr, B_H: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """Write running sums of `dt A log2(e)` within the chunk, and these less log2(dt), both `[B, H, padded]`.

    What token l sees of token s is then `2^(logs[l] - since[s])`, the time step with which s came included. A sum of
    100 has an error of 4e-6 in float32: FINE computes in float64, and writes what float32 leaves over behind each.
    """
    i_chunk, i_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_h, o_t = tl.program_id(1) * B_H + tl.arange(0, B_H), i_chunk * L + tl.arange(0, L)
    m_h = o_h < heads
    m = m_h[None, :] & (o_t < tokens)[:, None]
    p = p_dt + i_batch * s_dt_batch + o_t.to(tl.int64)[:, None] * s_dt_token + o_h[None, :] * s_dt_head
    wide: tl.constexpr = tl.float64 if FINE else tl.float32
    b_dt = tl.load(p, mask=m, other=0.0).to(wide)  # [L, B_H]
    if BIAS:
        b_dt += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(wide)[None, :]
    b_dt = softplus(b_dt)
    if LIMIT:
        b_dt = tl.minimum(tl.maximum(b_dt, low), high)
    m_dt = m & (b_dt > 0.0)
    b_a = tl.load(p_a + o_h, mask=m_h, other=0.0).to(wide) * _LOG2_E
    # 2^-150 is 0 in float32: what is smaller would only cost the sums of other tokens their last bits.
    b_logs = tl.cumsum(tl.where(m_dt, tl.maximum(b_dt * b_a[None, :], -150.0), 0.0), 0)
    b_since = b_logs - tl.log2(tl.where(m_dt, b_dt, 1.0))
    o = (i_batch * heads + o_h)[None, :] * padded + o_t[:, None]
    tl.store(p_logs + o, b_logs.to(tl.float32), mask=m_h[None, :])
    # Tokens that are not there, or take no time, change nothing.
    tl.store(p_since + o, tl.where(m_dt, b_since.to(tl.float32), float("inf")), mask=m_h[None, :])
    if FINE:
        o += tl.num_programs(2).to(tl.int64) * heads * padded
        tl.store(p_logs + o, (b_logs - b_logs.to(tl.float32)).to(tl.float32), mask=m_h[None, :])
        tl.store(p_since + o, (b_since - b_since.to(tl.float32)).to(tl.float32), mask=m_h[None, :])


@triton.jit
def _block(
    p, i_batch, t, i_row, o_t, o_c, m_c, s_token, tokens,
    L: tl.constexpr, B_C: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load the tokens `t ..` of the channels `WIDTH i_row + o_c`: `[L, B_C]`, 0 behind the last token."""
    if TMA:
        b = p.load([i_batch, t, i_row * WIDTH]).reshape(L, B_C)
    else:
        m = (t + o_t < tokens)[:, None] & m_c[None, :]
        b = tl.load(p + t.to(tl.int64) * s_token + o_t[:, None] * s_token + o_c[None, :], mask=m, other=0.0)
    return b


@triton.jit
def _walk_kernel(
    p_x, p_b, p_c, p_logs, p_since, p_skip, p_start, p_parts, p_totals, p_y, p_final,
    s_x_batch, s_x_token, s_x_head, s_b_batch, s_b_token, s_b_group, s_c_batch, s_c_token, s_c_group,
    tokens, padded, heads, each, per,
    P: tl.constexpr, B_P: tl.constexpr, N: tl.constexpr, B_N: tl.constexpr, L: tl.constexpr,
    OUTPUT: tl.constexpr, START: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment, `per` of them, with B_P channels of a head; `each` heads share B and C.

    OUTPUT: y `[B, T, H, P]`, and by the last segment the final state `[B, H, P, N]`. Else what the segment leaves,
    `[B, segments - 1, H, B_N, P]`, and its decay's logarithm, `[B, segments - 1, H]`.
    """
    blocks: tl.constexpr = (P + B_P - 1) // B_P
    i_head, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i_segment, i_batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1) if OUTPUT else tl.num_programs(1) + 1
    i_group = i_head // each
    o_t, o_n, o_p = tl.arange(0, L), tl.arange(0, B_N), i_block * B_P + tl.arange(0, B_P)
    m_n, m_p = o_n < N, o_p < P
    m_state = m_n[:, None] & m_p[None, :]
    o_part = o_n[:, None] * P + o_p[None, :]
    row = i_batch * heads + i_head
    if not TMA:
        p_x += i_batch * s_x_batch + i_head.to(tl.int64) * s_x_head
        p_b += i_batch * s_b_batch + i_group.to(tl.int64) * s_b_group
        p_c += i_batch * s_c_batch + i_group.to(tl.int64) * s_c_group
    fine = tl.num_programs(2).to(tl.int64) * heads * padded
    p_logs += row * padded
    p_since += row * padded
    p_y += (i_batch * tokens * heads + i_head) * P

    b_state = tl.zeros([B_N, B_P], tl.float32)
    if OUTPUT:
        if START:
            p_old = p_start + row * P * N + o_p[None, :] * N + o_n[:, None]
            b_state = tl.load(p_old, mask=m_state, other=0.0).to(tl.float32)
        for j in range(i_segment):
            part = (i_batch * (segments - 1) + j) * heads + i_head
            b_part = tl.load(p_parts + part * (B_N * P) + o_part, mask=m_p[None, :], other=0.0)
            b_state = b_state * tl.exp2(tl.load(p_totals + part)) + b_part
    total = tl.zeros([], tl.float32)
    first = i_segment * per
    last = tl.minimum(first + per, tl.cdiv(tokens, L))
    skip = tl.load(p_skip + i_head).to(tl.float32)
    for i in tl.range(first, last):
        t = i * L
        b_logs, b_since = tl.load(p_logs + t + o_t), tl.load(p_since + t + o_t)  # [L]
        end = tl.load(p_logs + t + L - 1)
        b_until = end - b_since  # logarithm of what the state keeps of each token
        if FINE:
            p_fine, p_fine_since = p_logs + fine + t, p_since + fine + t
            b_fine, b_fine_since = tl.load(p_fine + o_t), tl.load(p_fine_since + o_t)
            b_until += tl.load(p_fine + L - 1) - b_fine_since
        b_x = _block(p_x, tl.program_id(2), t, i_head * blocks + i_block, o_t, o_p, m_p, s_x_token, tokens,
                     L, B_P, B_P, TMA)  # fmt: skip
        b_b = _block(p_b, tl.program_id(2), t, i_group, o_t, o_n, m_n, s_b_token, tokens, L, B_N, N, TMA)
        if OUTPUT:
            b_c = _block(p_c, tl.program_id(2), t, i_group, o_t, o_n, m_n, s_c_token, tokens, L, B_N, N, TMA)
            b_w = tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)  # [L, L]
            b_left = b_logs[:, None] - b_since[None, :]
            if FINE:
                b_left += b_fine[:, None] - b_fine_since[None, :]
            b_left = tl.where(o_t[:, None] >= o_t[None, :], b_left, float("-inf"))
            b_w = (b_w * tl.exp2(b_left)).to(b_x.dtype)
            b_y = tl.dot(b_c, b_state.to(b_x.dtype), input_precision=PRECISION) * tl.exp2(b_logs)[:, None]
            b_y = tl.dot(b_w, b_x, b_y, input_precision=PRECISION)  # [L, B_P]
            if SKIP:
                b_y += b_x.to(tl.float32) * skip
            p = p_y + t.to(tl.int64) * heads * P + o_t[:, None] * heads * P + o_p[None, :]
            tl.store(p, b_y.to(p_y.dtype.element_ty), mask=(t + o_t < tokens)[:, None] & m_p[None, :])
        else:
            total += end
        b_scaled = (b_x.to(tl.float32) * tl.exp2(b_until)[:, None]).to(b_x.dtype)
        b_state = tl.dot(tl.trans(b_b), b_scaled, b_state * tl.exp2(end), input_precision=PRECISION)  # [B_N, B_P]

    if OUTPUT:
        if i_segment == segments - 1:
            tl.store(p_final + row * P * N + o_p[None, :] * N + o_n[:, None], b_state, mask=m_state)
    else:
        part = (i_batch * (segments - 1) + i_segment) * heads + i_head
        tl.store(p_parts + part * (B_N * P) + o_part, b_state, mask=m_p[None, :])
        if i_block == 0:
            tl.store(p_totals + part, total)


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    tile: ScanTile | None = None,
    engine: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Read T tokens; arguments and results as in `reference.scan`.

    B and C are brought to x's type. `tile` is how the kernels are cut; None: as `scan_tile` says. `engine`: whether
    Hopper's copy engine brings x, B and C, where it can; None: on Hopper.
    """
    (batch, tokens, heads, dim), (groups, size) = x.shape, B.shape[2:]
    x, B, C = unit_stride(x), unit_stride(B.to(x.dtype)), unit_stride(C.to(x.dtype))
    y = torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=x.device)
    final = torch.empty(batch, heads, dim, size, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, final.zero_() if state is None else final.copy_(state)
    held = None if state is None else state.contiguous()
    tile = tile or scan_tile(x.dtype, dim, size, roomy(x.device))
    chunk = tile.chunk
    chunks = triton.cdiv(tokens, chunk)
    block_p, block_n = tile.channels, max(16, triton.next_power_of_2(size))
    programs = heads * triton.cdiv(dim, block_p)
    per = triton.cdiv(chunks, tile.segments or max(1, min(_PROGRAMS // (batch * programs), chunks // 4)))
    segments = triton.cdiv(chunks, per)

    padded = chunks * chunk
    fine = x.dtype == torch.float32
    shape = (1 + fine, batch, heads, padded)
    logs, since = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    block_h = min(16, triton.next_power_of_2(heads))
    _steps_kernel[(chunks, triton.cdiv(heads, block_h), batch)](
        dt, A if dt_bias is None else dt_bias, A, logs, since, *dt.stride(), tokens, heads, padded, *dt_limit,
        L=chunk, B_H=block_h, BIAS=dt_bias is not None, LIMIT=dt_limit != NO_LIMIT, FINE=fine,
        num_warps=4,
    )  # fmt: skip

    parts = torch.empty(batch, segments - 1, heads, block_n, dim, dtype=torch.float32, device=x.device)
    totals = torch.empty(batch, segments - 1, heads, dtype=torch.float32, device=x.device)
    engine = (hopper(x.device) if engine is None else engine) and dim % block_p == 0 and size == block_n
    engine = engine and all(can_copy_tokens(z) for z in (x, B, C))
    read = [(x, block_p), (B, block_n), (C, block_n)]
    brought = [described_tokens(z, chunk, width) if engine else z for z, width in read]
    for output in [False, True] if segments > 1 else [True]:
        _walk_kernel[(programs, segments if output else segments - 1, batch)](
            *brought, logs, since, A if D is None else D, final if held is None else held, parts, totals, y, final,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], tokens, padded, heads, heads // groups, per,
            P=dim, B_P=block_p, N=size, B_N=block_n, L=chunk,
            OUTPUT=output, START=held is not None, SKIP=D is not None,
            PRECISION="tf32x3" if fine else "ieee", TMA=engine, FINE=fine,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y, final
