"""Mamba-2's scan, its decode step, and the gated norm behind them; see `reference.py` and README.md."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longspan.kernels.mamba2 import reference
from longspan.kernels.mamba2.reference import NO_LIMIT
from longspan.kernels.serving import triton_serves

__all__ = ["NO_LIMIT", "gated_rmsnorm", "mixer_step", "scan", "step"]


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
) -> tuple[Tensor, Tensor]:
    """Read T tokens with the fastest version that serves; see `reference.scan`."""
    given: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "state": state, "dt_limit": dt_limit}
    if triton_serves(x, dt, A, B, C, D, dt_bias, state):
        from longspan.kernels.mamba2 import triton_scan

        return triton_scan.scan(x, dt, A, B, C, **given)
    return reference.scan(x, dt, A, B, C, **given)


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
    """Read one token with the fastest version that serves; see `reference.step`."""
    given: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_limit": dt_limit}
    if triton_serves(x, dt, A, B, C, D, dt_bias, state):
        from longspan.kernels.mamba2 import triton_decode

        return triton_decode.step(x, dt, A, B, C, state=state, **given)
    return reference.step(x, dt, A, B, C, state=state, **given)


def gated_rmsnorm(y: Tensor, gate: Tensor, weight: Tensor | None, groups: int, eps: float) -> Tensor:
    """Gate and normalise with the fastest version that serves; see `reference.gated_rmsnorm`."""
    if triton_serves(y, gate, weight):
        from longspan.kernels.mamba2 import triton_norm

        return triton_norm.gated_rmsnorm(y, gate, weight, groups, eps)
    return reference.gated_rmsnorm(y, gate, weight, groups, eps)


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
    """Decode one token of a layer with the fastest version that serves; see `reference.mixer_step`."""
    given: dict[str, Any] = {
        "groups": groups, "norm_groups": norm_groups, "eps": eps, "D": D, "dt_bias": dt_bias, "dt_limit": dt_limit,
        "activation": activation,
    }  # fmt: skip
    version = reference.mixer_step
    if triton_serves(projected, conv_weight, conv_bias, conv_state, A, state, norm_weight, D, dt_bias):
        from longspan.kernels.mamba2 import triton_decode

        version = triton_decode.mixer_step
    return version(projected, conv_weight, conv_bias, conv_state, A, state, norm_weight, **given)
