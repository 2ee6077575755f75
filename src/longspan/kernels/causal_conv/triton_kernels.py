"""Short causal convolutions as Triton kernels.

A program takes blocks of tokens of some channels, and reads each block once for each tap: device memory brings it once,
the first cache the other times. The taps' weights stay in registers from block to block. Programs of neighbouring
channels are neighbours, so that rows are read whole. What touches a state, the first tokens and the new state, is a
small launch of its own: within the first kernel it costs registers, and so the loads that hide each other's waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Tokens and channels of a block, blocks that a program takes one after another, and its warps."""

    tokens: int = 16
    channels: int = 128
    blocks: int = 8
    warps: int = 4


@triton.jit
def _causal_conv_kernel(
    p_x, p_weight, p_bias, p_y, s_x_batch, s_x_token, s_weight, tokens,
    C: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Convolve blocks of tokens, as if inputs before the first were 0."""
    i_c, i_t, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c, o_t = i_c * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    m_c = o_c < C
    p_x += i_batch * s_x_batch
    p_weight += o_c * s_weight
    b_bias = tl.zeros([BLOCK_C], tl.float32)
    if BIAS:
        b_bias += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i in tl.range(0, tl.minimum(BLOCKS, tl.cdiv(tokens, BLOCK_T) - i_t * BLOCKS)):
        first = (i_t * BLOCKS + i) * BLOCK_T
        p_tile = p_x + first.to(tl.int64) * s_x_token + o_c[None, :]
        m_t = first + o_t < tokens
        b_y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32) + b_bias[None, :]
        for w in tl.static_range(W):
            o_at = o_t - (W - 1 - w)  # relative to the block's first token
            m = m_c[None, :] & ((first + o_at >= 0) & m_t)[:, None]
            b_x = tl.load(p_tile + o_at[:, None] * s_x_token, mask=m, other=0.0).to(tl.float32)
            b_y += b_x * tl.load(p_weight + w, mask=m_c, other=0.0).to(tl.float32)[None, :]
        if SILU:
            b_y = b_y * tl.sigmoid(b_y)
        p_out = p_y + (i_batch * tokens + first) * C + o_t[:, None] * C + o_c[None, :]
        tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_c[None, :] & m_t[:, None])


@triton.jit
def _edges_kernel(
    p_x, p_weight, p_bias, p_state, p_y, p_newest,
    s_x_batch, s_x_token, s_state_batch, s_state_channel, s_weight, tokens,
    C: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr,
    BIAS: tl.constexpr, STATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Write the new state and, where there was one, the first W - 1 tokens that see it."""
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_x += i_batch * s_x_batch + o_c
    p_state += i_batch * s_state_batch + o_c * s_state_channel
    if STATE:
        for t in tl.static_range(W - 1):
            m = m_c & (tokens > t + o_c * 0)  # the comparison as a block: which the interpreter needs
            b_y = tl.zeros([BLOCK_C], tl.float32)
            if BIAS:
                b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
            for w in tl.static_range(W):
                if t + w < W - 1:
                    b_in = tl.load(p_state + (t + w), mask=m_c, other=0.0).to(tl.float32)
                else:
                    b_in = tl.load(p_x + (t + w - (W - 1)) * s_x_token, mask=m, other=0.0).to(tl.float32)
                b_y += b_in * tl.load(p_weight + o_c * s_weight + w, mask=m_c, other=0.0).to(tl.float32)
            if SILU:
                b_y = b_y * tl.sigmoid(b_y)
            tl.store(p_y + (i_batch * tokens + t) * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m)
    for w in tl.static_range(W - 1):
        at = tokens - (W - 1) + w
        b_new = tl.zeros([BLOCK_C], p_newest.dtype.element_ty)
        if at >= 0:
            b_new = tl.load(p_x + at.to(tl.int64) * s_x_token, mask=m_c, other=0.0)
        elif STATE:
            b_new = tl.load(p_state + (W - 1 + at), mask=m_c, other=0.0).to(p_newest.dtype.element_ty)
        tl.store(p_newest + (i_batch * C + o_c) * (W - 1) + w, b_new, mask=m_c)


@triton.jit
def convolved(
    p_x, p_weight, p_bias, p_state, o_c, m_c, s_weight, s_state_channel,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Return one token's channels `o_c` convolved, in float32; the state is only read."""
    b_x = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_y = b_x * tl.load(p_weight + o_c * s_weight + (W - 1), mask=m_c, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        b_old = tl.load(p_state + o_c * s_state_channel + w, mask=m_c, other=0.0).to(tl.float32)
        b_y += b_old * tl.load(p_weight + o_c * s_weight + w, mask=m_c, other=0.0).to(tl.float32)
    if BIAS:
        b_y += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if SILU:
        b_y = b_y * tl.sigmoid(b_y)
    return b_y


@triton.jit
def shift_state(p_x, p_state, o_c, m_c, s_state_channel, W: tl.constexpr):
    """Take one token's channels into the state."""
    for w in tl.static_range(W - 2):
        b_old = tl.load(p_state + o_c * s_state_channel + (w + 1), mask=m_c, other=0.0)
        tl.store(p_state + o_c * s_state_channel + w, b_old, mask=m_c)
    if W > 1:
        b_x = tl.load(p_x + o_c, mask=m_c, other=0.0)
        tl.store(p_state + o_c * s_state_channel + (W - 2), b_x.to(p_state.dtype.element_ty), mask=m_c)


@triton.jit
def _step_kernel(
    p_x, p_weight, p_bias, p_state, p_y, s_x_batch, s_state_batch, s_state_channel, s_weight,
    C: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    i_batch = tl.program_id(1).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_x += i_batch * s_x_batch
    p_state += i_batch * s_state_batch
    b_y = convolved(p_x, p_weight, p_bias, p_state, o_c, m_c, s_weight, s_state_channel, W, BIAS, SILU)
    tl.store(p_y + i_batch * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)
    shift_state(p_x, p_state, o_c, m_c, s_state_channel, W)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    *,
    activation: str | None = "silu",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its past; see `reference.causal_conv`. `tile` is how the kernel is cut."""
    assert activation in ("silu", None), activation
    x = x if x.stride(-1) == 1 else x.contiguous()
    (batch, tokens, channels), width = x.shape, weight.shape[1]
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    newest = torch.empty(batch, channels, width - 1, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y, newest.zero_() if state is None else newest.copy_(state)
    if batch * channels == 0:
        return y, newest
    held = None if state is None else unit_stride(state)
    weight = unit_stride(weight)
    tile = tile or Tile()
    block_t = min(tile.tokens, triton.next_power_of_2(tokens))
    block_c = min(tile.channels, triton.next_power_of_2(channels))
    pieces = triton.cdiv(tokens, block_t * tile.blocks)
    taps = {"C": channels, "W": width, "BIAS": bias is not None, "SILU": activation == "silu"}
    _causal_conv_kernel[(triton.cdiv(channels, block_c), pieces, batch)](
        x, weight, weight if bias is None else bias, y, x.stride(0), x.stride(1), weight.stride(0), tokens,
        BLOCK_T=block_t, BLOCK_C=block_c, BLOCKS=tile.blocks, **taps, num_warps=tile.warps,
    )  # fmt: skip
    if width > 1:
        _edges_kernel[(triton.cdiv(channels, block_c), batch)](
            x, weight, weight if bias is None else bias, x if held is None else held, y, newest,
            x.stride(0), x.stride(1), *((0, 0) if held is None else held.stride()[:2]), weight.stride(0), tokens,
            BLOCK_C=block_c, STATE=held is not None, **taps, num_warps=1,
        )  # fmt: skip
    return y, newest


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = "silu"
) -> Tensor:
    """Convolve one token's channels, and take it into the state; see `reference.causal_conv_step`."""
    assert activation in ("silu", None), activation
    assert state.shape[-1] <= 1 or state.stride(-1) == 1, "a channel's inputs lie together"
    x, weight = (unit_stride(one) for one in (x, weight))
    (batch, channels), width = x.shape, weight.shape[1]
    y = torch.empty(batch, channels, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_c = min(128, triton.next_power_of_2(channels))
    _step_kernel[(triton.cdiv(channels, block_c), batch)](
        x, weight, weight if bias is None else bias, state, y,
        x.stride(0), state.stride(0), state.stride(1), weight.stride(0),
        C=channels, W=width, BLOCK_C=block_c, BIAS=bias is not None, SILU=activation == "silu", num_warps=1,
    )  # fmt: skip
    return y


def unit_stride(x: Tensor) -> Tensor:
    """Return x with its last axis lying together: x itself where it does."""
    return x if x.stride(-1) == 1 else x.contiguous()
