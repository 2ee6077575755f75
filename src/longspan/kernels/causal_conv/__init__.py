"""Short causal convolutions, a channel each, with the state that goes on from; see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.causal_conv import reference
from longspan.kernels.serving import triton_serves

__all__ = ["causal_conv", "causal_conv_step"]


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, *, activation: str | None = "silu"
) -> tuple[Tensor, Tensor]:
    """Convolve with the fastest version that serves; see `reference.causal_conv`."""
    if triton_serves(x, weight, bias, state):
        from longspan.kernels.causal_conv import triton_kernels

        return triton_kernels.causal_conv(x, weight, bias, state, activation=activation)
    return reference.causal_conv(x, weight, bias, state, activation=activation)


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, *, activation: str | None = "silu"
) -> Tensor:
    """Convolve one token with the fastest version that serves; see `reference.causal_conv_step`."""
    if triton_serves(x, weight, bias, state):
        from longspan.kernels.causal_conv import triton_kernels

        return triton_kernels.causal_conv_step(x, weight, bias, state, activation=activation)
    return reference.causal_conv_step(x, weight, bias, state, activation=activation)
