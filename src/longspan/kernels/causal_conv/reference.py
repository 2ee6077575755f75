"""Short causal convolutions in plain PyTorch, one a channel: the truth for faster versions.

    y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W - 1) + w, c])

Inputs before the first are a state: the newest W - 1 inputs of what was read so far (none: zeros), oldest first. It
does not know what the channels are for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its past.

    Args:
        x: `[B, T, C]`, any float type; computed in float32 (float64 stays float64). May be a view.
        weight: `[C, W]`, W at least 1.
        bias: `[C]` or None.
        state: `[B, C, W - 1]`, the inputs before the first, oldest first; None: zeros.
        activation: "silu" or None.

    Returns:
        `(y [B, T, C], state [B, C, W - 1])` in x's type: the new state is a new tensor.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels, width = weight.shape
    if state is None:
        state = x.new_zeros(x.shape[0], channels, width - 1)
    seen = torch.cat([state.to(x.dtype), x.mT], -1)  # [B, C, W - 1 + T]
    newest = seen[..., seen.shape[-1] - (width - 1) :].contiguous()
    if x.shape[1] == 0:
        return torch.empty_like(x), newest
    y = F.conv1d(
        seen.to(wide), weight.to(wide).unsqueeze(1), None if bias is None else bias.to(wide), groups=channels
    )  # fmt: skip
    return _activated(y, activation).mT.to(x.dtype).contiguous(), newest


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = "silu"
) -> Tensor:
    """Convolve one token's channels, and take the token into the state.

    Args:
        x: `[B, C]`, as in `causal_conv`.
        weight: `[C, W]`.
        bias: `[C]` or None.
        state: `[B, C, W - 1]`, updated in place.
        activation: "silu" or None.

    Returns:
        y `[B, C]` in x's type.
    """
    y, newest = causal_conv(x.unsqueeze(1), weight, bias, state, activation=activation)
    state.copy_(newest)
    return y.squeeze(1)


def _activated(y: Tensor, activation: str | None) -> Tensor:
    assert activation in ("silu", None), activation
    return y if activation is None else F.silu(y)
