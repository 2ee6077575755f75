"""Mixtures of experts: `route` chooses, `experts` sums, `mixture` does both (`reference.py`)."""

from __future__ import annotations

from torch import Tensor

from longspan.kernels.experts import reference
from longspan.kernels.experts.reference import Routing
from longspan.kernels.serving import triton_serves

__all__ = ["Routing", "experts", "mixture", "route"]

_FEW = 4
"""Tokens up to which each reads its experts' weights by itself: few of them share any."""


def route(
    logits: Tensor, bias: Tensor | None, *, top: int, groups: int = 1, top_groups: int = 1, normalise: bool = True,
    scale: float = 1.0, scores: str = "sigmoid",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose experts with the fastest version that serves; see `reference.Routing` and `reference.route`."""
    routing = Routing(top, groups, top_groups, normalise, scale, scores)
    if triton_serves(logits):
        from longspan.kernels.experts import triton_kernels

        return triton_kernels.route(logits, bias, routing)
    return reference.route(logits, bias, routing)


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    activation: str = "relu2",
    shared: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Sum what experts make of tokens, with the fastest version that serves; see `reference.experts`."""
    given = (x, up, down, ids, weights)
    if not triton_serves(x, up):
        return reference.experts(*given, activation=activation, shared=shared, residual=residual)
    from longspan.kernels.experts import triton_decode, triton_prefill

    if x.shape[0] <= _FEW:
        return triton_decode.experts(*given, activation=activation, shared=shared, residual=residual)
    return triton_prefill.experts(*given, activation=activation, shared=shared, residual=residual)


def mixture(
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    *,
    routing: Routing,
    activation: str = "relu2",
    shared: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Choose experts and sum what they make of tokens: `route` and `experts`, of few tokens in two launches."""
    if triton_serves(x, up):
        from longspan.kernels.experts import triton_decode, triton_kernels

        if x.shape[0] <= _FEW:
            return triton_decode.mixture(
                x, logits, bias, up, down, routing=routing, activation=activation, shared=shared, residual=residual
            )
        ids, weights = triton_kernels.route(logits, bias, routing)
    else:
        ids, weights = reference.route(logits, bias, routing)
    return experts(x, up, down, ids, weights, activation=activation, shared=shared, residual=residual)
