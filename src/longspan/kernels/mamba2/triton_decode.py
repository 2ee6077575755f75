"""One token of a Mamba-2 layer as two Triton kernels, between the layer's two projections.

1. `_step_kernel`: a program takes some channels of one head. It convolves them and its group's B and C (again in each
   of the group's programs: a few hundred numbers), makes the time step, reads and writes its rows of the state once.
2. `_finish_kernel`: some programs gate and normalise a group of channels each; others take the token into the state of
   the convolution, which the first kernel only reads, since many of its programs read the same channels of it.

The state's bytes are the floor. Nothing waits for the host: both can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from longspan.kernels.causal_conv.triton_kernels import convolved, shift_state, unit_stride
from longspan.kernels.mamba2.reference import NO_LIMIT
from longspan.kernels.mamba2.triton_norm import gated_norm
from longspan.kernels.mamba2.triton_scan import softplus
from longspan.kernels.tiles import hopper

_SHIFTED = 512
"""Channels of which one program shifts the convolution's state."""


@triton.jit
def _step_kernel(
    p_x, p_b, p_c, p_dt, p_weight, p_conv_bias, p_conv_state, p_a, p_skip, p_bias, p_state, p_y,
    s_x_batch, s_x_head, s_b_batch, s_b_group, s_c_batch, s_c_group, s_dt_batch, s_dt_head,
    s_weight, s_conv_batch, s_conv_channel, s_state_batch, s_state_head, heads, each, low, high,
    P: tl.constexpr, B_P: tl.constexpr, N: tl.constexpr, B_N: tl.constexpr, W: tl.constexpr, INNER: tl.constexpr,
    SHARED: tl.constexpr, CONVOLVE: tl.constexpr, CONV_BIAS: tl.constexpr, SILU: tl.constexpr, SKIP: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr, FINE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Take a token into B_P rows of one head's state. CONVOLVE: x, B and C lie together as the convolution's channels,
    from `p_x` on: INNER of x, then SHARED of B, then as many of C. FINE: the time step is made in float64.
    """
    if EARLY:
        gdc_launch_dependents()
    i_head, i_block, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_group = i_head // each
    o_p, o_n = i_block * B_P + tl.arange(0, B_P), tl.arange(0, B_N)
    m_p, m_n = o_p < P, o_n < N
    p = p_state + i_batch * s_state_batch + i_head.to(tl.int64) * s_state_head + o_p[:, None] * N + o_n[None, :]
    b_state = tl.load(p, mask=m_p[:, None] & m_n[None, :], other=0.0)  # [B_P, B_N]
    if CONVOLVE:
        p_x += i_batch * s_x_batch
        p_conv_state += i_batch * s_conv_batch
        o_b = INNER + i_group * N + o_n
        b_x = convolved(p_x, p_weight, p_conv_bias, p_conv_state, i_head * P + o_p, m_p, s_weight, s_conv_channel,
                        W, CONV_BIAS, SILU)  # fmt: skip
        b_b = convolved(p_x, p_weight, p_conv_bias, p_conv_state, o_b, m_n, s_weight, s_conv_channel,
                        W, CONV_BIAS, SILU)  # fmt: skip
        b_c = convolved(p_x, p_weight, p_conv_bias, p_conv_state, o_b + SHARED, m_n, s_weight, s_conv_channel,
                        W, CONV_BIAS, SILU)  # fmt: skip
    else:
        b_x = tl.load(p_x + i_batch * s_x_batch + i_head * s_x_head + o_p, mask=m_p, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + i_batch * s_b_batch + i_group * s_b_group + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_c = tl.load(p_c + i_batch * s_c_batch + i_group * s_c_group + o_n, mask=m_n, other=0.0).to(tl.float32)
    wide: tl.constexpr = tl.float64 if FINE else tl.float32
    dt = tl.load(p_dt + i_batch * s_dt_batch + i_head * s_dt_head).to(wide)
    if BIAS:
        dt += tl.load(p_bias + i_head).to(wide)
    dt = softplus(dt)
    if LIMIT:
        dt = tl.minimum(tl.maximum(dt, low), high)
    keep = tl.exp(dt * tl.load(p_a + i_head).to(wide)).to(tl.float32)
    b_state = b_state * keep + (b_x * dt.to(tl.float32))[:, None] * b_b[None, :]
    tl.debug_barrier()  # several threads hold the same numbers of a small state: all must have read before one writes
    tl.store(p, b_state, mask=m_p[:, None] & m_n[None, :])
    b_y = tl.sum(b_state * b_c[None, :], 1)
    if SKIP:
        b_y += b_x * tl.load(p_skip + i_head).to(tl.float32)
    tl.store(p_y + (i_batch * heads + i_head) * P + o_p, b_y.to(p_y.dtype.element_ty), mask=m_p)


@triton.jit
def _finish_kernel(
    p_y, p_gate, p_norm_weight, p_out, p_x, p_conv_state,
    s_gate, s_x_batch, s_conv_batch, s_conv_channel, eps,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, B_W: tl.constexpr, NORM: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gate and normalise one group, or shift some channels of the convolution's state."""
    i_part, i_batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if EARLY:
        gdc_wait()
    if i_part < GROUPS:
        o_r = i_batch * GROUPS + i_part + tl.arange(0, 1)
        gated_norm(p_y, p_gate, p_norm_weight, p_out, o_r, o_r >= 0, GROUPS * WIDTH, s_gate, eps,
                   GROUPS, WIDTH, B_W, NORM)  # fmt: skip
    else:
        o_c = (i_part - GROUPS) * BLOCK_C + tl.arange(0, BLOCK_C)
        p_conv_state += i_batch * s_conv_batch
        shift_state(p_x + i_batch * s_x_batch, p_conv_state, o_c, o_c < C, s_conv_channel, W)


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor:
    """Read one token, and take it into the state; arguments and results as in `reference.step`."""
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    (batch, heads, dim), groups = x.shape, B.shape[1]
    y = torch.empty(batch, heads, dim, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    _launch(
        (x, B, C, dt), None, A, D, dt_bias, state, y,
        (*x.stride()[:2], *B.stride()[:2], *C.stride()[:2]), groups, dt_limit, silu=False, early=False,
    )  # fmt: skip
    return y


def mixer_step(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    A: Tensor,
    state: Tensor,
    norm_weight: Tensor | None,
    *,
    groups: int,
    norm_groups: int,
    eps: float,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    early: bool | None = None,
    channels: int = 16,
) -> Tensor:
    """Decode one token of a layer; arguments and results as in `reference.mixer_step`, and beyond it:

    `early`: whether the second kernel's programs may start before the last of the first's have ended, and wait for them
    (programmatic dependent launch); None: on Hopper. `channels` of a head that a program takes.
    """
    assert activation in ("silu", None), activation
    (batch, heads, dim, size), width = state.shape, conv_weight.shape[1]
    inner, shared = heads * dim, groups * size
    projected, conv_weight = unit_stride(projected), unit_stride(conv_weight)
    assert conv_state.shape[-1] <= 1 or conv_state.stride(-1) == 1, "a channel's inputs lie together"
    early = hopper(projected.device) if early is None else early
    gate, mixed, dt = projected.split([inner, inner + 2 * shared, heads], -1)
    y = torch.empty(batch, inner, dtype=torch.float32, device=projected.device)
    out = torch.empty(batch, inner, dtype=projected.dtype, device=projected.device)
    if out.numel() == 0:
        return out
    _launch(
        (mixed, mixed, mixed, dt), (conv_weight, conv_bias, conv_state), A, D, dt_bias, state, y,
        (mixed.stride(0), 0, 0, 0, 0, 0), groups, dt_limit, silu=activation == "silu", early=early, channels=channels,
    )  # fmt: skip
    group = inner // norm_groups
    block_c = min(_SHIFTED, triton.next_power_of_2(mixed.shape[1]))
    shifting = triton.cdiv(mixed.shape[1], block_c) if width > 1 else 0
    block_w = triton.next_power_of_2(group)
    _finish_kernel[(norm_groups + shifting, batch)](
        y, gate, gate if norm_weight is None else norm_weight, out, mixed, conv_state,
        gate.stride(0), mixed.stride(0), conv_state.stride(0), conv_state.stride(1), eps,
        GROUPS=norm_groups, WIDTH=group, B_W=block_w, NORM=norm_weight is not None,
        C=mixed.shape[1], W=width, BLOCK_C=block_c, EARLY=early,
        num_warps=max(1, min(8, block_w // 256)), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    convolution: tuple[Tensor, Tensor | None, Tensor] | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    y: Tensor,
    strides: Sequence[int],
    groups: int,
    dt_limit: tuple[float, float],
    *,
    silu: bool,
    early: bool,
    channels: int = 16,
) -> None:
    """Start the first kernel on x, B, C and dt: outputs of the convolution, or its inputs where weights are given."""
    assert state.dtype == torch.float32, "the state is float32"
    batch, heads, dim, size = state.shape
    assert state.stride()[2:] == (size, 1), "a head's state lies together"
    block_p = min(channels, triton.next_power_of_2(dim))
    weight, bias, held = convolution or (A, None, A)
    conv_strides = (0, 0, 0) if convolution is None else (weight.stride(0), *held.stride()[:2])
    _step_kernel[(heads, triton.cdiv(dim, block_p), batch)](
        *inputs, weight, A if bias is None else bias, held,
        A, A if D is None else D, A if dt_bias is None else dt_bias, state, y,
        *strides, *inputs[3].stride(), *conv_strides, *state.stride()[:2], heads, heads // groups, *dt_limit,
        P=dim, B_P=block_p, N=size, B_N=triton.next_power_of_2(size),
        W=1 if convolution is None else weight.shape[1], INNER=heads * dim, SHARED=groups * size,
        CONVOLVE=convolution is not None, CONV_BIAS=bias is not None, SILU=silu,
        SKIP=D is not None, BIAS=dt_bias is not None, LIMIT=dt_limit != NO_LIMIT,
        FINE=inputs[0].dtype == torch.float32, EARLY=early, num_warps=4,
    )  # fmt: skip
