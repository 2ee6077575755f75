"""Mamba-2 (state-space duality, arXiv 2405.21060) in plain PyTorch: the truth for faster versions.

A head of P channels keeps a state `S [P, N]`. With the time step `d[t] = softplus(dt[t] + dt_bias)`,

    S[t] = exp(d[t] A) S[t-1] + d[t] x[t] B[t]^T,     y[t] = S[t] C[t] + D x[t].

`scan` takes chunks of tokens at once (README.md has the equations), `step` one token. `gated_rmsnorm` is the norm that
follows, `mixer_step` a whole layer's decode between its two projections. They know nothing of weights' names, nor how
long a state is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.kernels.causal_conv import reference as convolution

NO_LIMIT = (0.0, float("inf"))


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
    chunk: int = 64,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> tuple[Tensor, Tensor]:
    """Read T tokens, and go on from a state.

    Args:
        x: `[B, T, H, P]`, any float type; computed in float32 (float64 stays float64). Like dt, B and C it may be a
            view.
        dt: `[B, T, H]`, time steps before their bias and softplus.
        A: `[H]`, negative.
        B: `[B, T, G, N]`; head h reads group `h // (H // G)`.
        C: `[B, T, G, N]`.
        D: `[H]`, how much of x is added to its output; None: nothing.
        dt_bias: `[H]` or None.
        state: `[B, H, P, N]`, what earlier tokens left; None: zeros.
        chunk: tokens taken at once.
        dt_limit: least and largest time step.

    Returns:
        `(y [B, T, H, P] in x's type, state [B, H, P, N] in the computing type)`; the state is a new tensor.
    """
    wide = _wide(x)
    (batch, tokens, heads, dim), (groups, size) = x.shape, B.shape[2:]
    held = x.new_zeros(batch, heads, dim, size, dtype=wide) if state is None else state.to(wide, copy=True)
    y = torch.empty(batch, heads, tokens, dim, dtype=wide, device=x.device)
    for start in range(0, tokens, chunk):
        here = slice(start, min(tokens, start + chunk))
        b_x = x[:, here].to(wide).transpose(1, 2)  # [B, H, L, P]
        b_b, b_c = (
            z[:, here].to(wide).transpose(1, 2).repeat_interleave(heads // groups, 1) for z in (B, C)
        )  # [B, H, L, N]
        b_dt = time_steps(dt[:, here], dt_bias, dt_limit).to(wide).mT  # [B, H, L]
        b_log = b_dt * A.to(wide).unsqueeze(-1)
        left = _sums_between(b_log)  # [B, H, L, L], logarithm of what is left at l of what came at s
        since = b_log.cumsum(-1)
        weights = b_c @ b_b.mT * left.exp() * b_dt.unsqueeze(-2)
        b_y = weights @ b_x + (b_c @ held.mT) * since.exp().unsqueeze(-1)
        held = held * since[..., -1:, None].exp()
        held = held + (b_x * (b_dt * left[..., -1, :].exp()).unsqueeze(-1)).mT @ b_b
        y[:, :, here] = b_y if D is None else b_y + b_x * D.to(wide).view(-1, 1, 1)
    return y.transpose(1, 2).to(x.dtype).contiguous(), held


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
    """Read one token, and take it into the state.

    Args:
        x: `[B, H, P]`, as in `scan`.
        dt: `[B, H]`.
        A: `[H]`.
        B: `[B, G, N]`.
        C: `[B, G, N]`.
        state: `[B, H, P, N]`, updated in place.
        D: `[H]` or None.
        dt_bias: `[H]` or None.
        dt_limit: least and largest time step.

    Returns:
        y `[B, H, P]` in x's type.
    """
    one = [z.unsqueeze(1) for z in (x, dt, B, C)]
    y, newest = scan(one[0], one[1], A, one[2], one[3], D=D, dt_bias=dt_bias, state=state, dt_limit=dt_limit)
    state.copy_(newest)
    return y.squeeze(1)


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor | None, groups: int, eps: float) -> Tensor:
    """Return `y * silu(gate)`, normalised in groups of channels and multiplied by a weight.

    Args:
        y: `[..., C]`, any float type; computed in float32 (float64 stays float64).
        gate: `[..., C]`; may be a view.
        weight: `[C]`; None: gated only.
        groups: how many groups of neighbouring channels are normalised, each by itself.
        eps: added to the mean of squares.

    Returns:
        `[..., C]` in the gate's type.
    """
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    gated = y.to(wide) * F.silu(gate.to(wide))
    if weight is not None:
        parts = gated.unflatten(-1, (groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
        gated = parts.flatten(-2) * weight.to(wide)
    return gated.to(gate.dtype)


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
) -> Tensor:
    """Decode one token of a Mamba-2 layer from its first projection's output to its second's input.

    Args:
        projected: `[B, 2 H P + 2 G N + H]`: gate, x, B, C and dt of every sequence, in this order.
        conv_weight: `[H P + 2 G N, W]`, of x, B and C.
        conv_bias: `[H P + 2 G N]` or None.
        conv_state: `[B, H P + 2 G N, W - 1]`, updated in place.
        A: `[H]`, negative.
        state: `[B, H, P, N]`, float32, updated in place.
        norm_weight: `[H P]`; None: gated only.
        groups: G, groups of heads that share B and C.
        norm_groups: as `groups` in `gated_rmsnorm`.
        eps: as there.
        D: `[H]` or None.
        dt_bias: `[H]` or None.
        dt_limit: least and largest time step.
        activation: of the convolution, "silu" or None.

    Returns:
        `[B, H P]` in the type of `projected`.
    """
    heads, dim, size = state.shape[1:]
    inner, shared = heads * dim, groups * size
    gate, mixed, dt = projected.split([inner, inner + 2 * shared, heads], -1)
    mixed = convolution.causal_conv_step(mixed, conv_weight, conv_bias, conv_state, activation=activation)
    x, b, c = mixed.split([inner, shared, shared], -1)
    y = step(
        x.unflatten(-1, (heads, dim)), dt, A, b.unflatten(-1, (groups, size)), c.unflatten(-1, (groups, size)),
        state=state, D=D, dt_bias=dt_bias, dt_limit=dt_limit,
    )  # fmt: skip
    return gated_rmsnorm(y.flatten(1), gate, norm_weight, norm_groups, eps)


def time_steps(dt: Tensor, dt_bias: Tensor | None, limit: tuple[float, float]) -> Tensor:
    """Return the time steps `softplus(dt + dt_bias)` within their limits, in the computing type."""
    wide = _wide(dt)
    steps = F.softplus(dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide))
    return steps if limit == NO_LIMIT else steps.clamp(*limit)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sums_between(logs: Tensor) -> Tensor:
    """Return `[..., L, L]`: at (l, s) the sum of the logarithms after s up to l, minus infinity where s is after l.

    Summed one by one: differences of running sums would lose what is small behind what is large.
    """
    length = logs.shape[-1]
    at = torch.arange(length, device=logs.device)
    after = at.unsqueeze(-1) > at  # [l, s]: s lies before l
    sums = logs.unsqueeze(-1).expand(*logs.shape, length).masked_fill(~after, 0.0).cumsum(-2)
    return sums.masked_fill(at.unsqueeze(-1) < at, float("-inf"))
