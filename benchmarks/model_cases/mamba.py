"""Mamba-2 layers without their projections, and RMSNorm, as `benchmarks.model_kernels` times them.

Shapes are Nemotron-3-Nano's: hidden 2688, 64 heads of 64 channels, 8 groups, state 128, 4 taps. Inputs of a layer are
views of one projection's output, as in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.model_cases.frame import Case, Options, normal, rounds
from longspan.kernels.causal_conv import reference as conv_reference
from longspan.kernels.causal_conv import triton_kernels as conv_kernels
from longspan.kernels.mamba2 import reference, triton_decode, triton_norm, triton_scan
from longspan.kernels.rmsnorm import reference as norm_reference
from longspan.kernels.rmsnorm import triton_kernels as norm_kernels
from longspan.kernels.tiles import roomy

HIDDEN, HEADS, DIM, GROUPS, STATE, TAPS = 2688, 64, 64, 8, 128, 4
INNER, SHARED = HEADS * DIM, GROUPS * STATE
MIXED = INNER + 2 * SHARED
EPS = 1e-5


@dataclass(frozen=True)
class Layer:
    """A Mamba-2 layer's small weights, as a model of this shape begins them."""

    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    norm_weight: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype) -> Layer:
        """Draw one."""
        return cls(
            normal(MIXED, TAPS, dtype=dtype, scale=0.5), normal(MIXED, dtype=dtype, scale=0.1),
            -1 - 15 * torch.rand(HEADS, device="cuda"), normal(HEADS, dtype=torch.float32, shift=1.0),
            normal(HEADS, dtype=torch.float32, scale=1.0, shift=-4.0), normal(INNER, dtype=dtype, scale=0.1, shift=1.0),
        )  # fmt: skip

    def steps(self) -> dict[str, Tensor]:
        """Return what makes time steps, by name."""
        return {"D": self.D, "dt_bias": self.dt_bias}


def cases(what: str, options: Options) -> Iterator[Case]:
    """Make the cases of one name."""
    yield from MAKERS[what](options)


def split(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, the convolution's channels, and time steps: views."""
    gate, mixed, dt = projected.split([INNER, MIXED, HEADS], -1)
    return gate, mixed, dt


def scanned(mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, B and C: views."""
    x, b, c = mixed.split([INNER, SHARED, SHARED], -1)
    return x.unflatten(-1, (HEADS, DIM)), b.unflatten(-1, (GROUPS, STATE)), c.unflatten(-1, (GROUPS, STATE))


def _conv(options: Options) -> Iterator[Case]:
    layer, dtype, tokens = Layer.of(options.dtype), options.dtype, options.tokens
    _, mixed, _ = split(normal(1, tokens, INNER + MIXED + HEADS, dtype=dtype))
    state = normal(1, MIXED, TAPS - 1, dtype=dtype)

    def call(**tile: int) -> tuple[Tensor, Tensor]:
        cut = conv_kernels.Tile(**tile)
        return conv_kernels.causal_conv(mixed, layer.conv_weight, layer.conv_bias, state, tile=cut)

    def wanted() -> tuple[Tensor, Tensor]:
        return conv_reference.causal_conv(mixed.float(), layer.conv_weight, layer.conv_bias, state)

    yield Case(f"conv {tokens}", [call], call, wanted, 2 * tokens * MIXED * mixed.element_size())


def _scan(options: Options) -> Iterator[Case]:
    layer, dtype, tokens = Layer.of(options.dtype), options.dtype, options.tokens
    _, _, dt = split(normal(1, tokens, INNER + MIXED + HEADS, dtype=dtype))
    x, b, c = scanned(normal(1, tokens, MIXED, dtype=dtype))
    state = normal(1, HEADS, DIM, STATE, dtype=torch.float32)

    def call(**tile: int) -> tuple[Tensor, Tensor]:
        engine = bool(tile.pop("engine")) if "engine" in tile else None
        usual = triton_scan.scan_tile(dtype, DIM, STATE, roomy(x.device))
        cut = triton_scan.ScanTile(**(vars(usual) | tile))
        return triton_scan.scan(x, dt, layer.A, b, c, **layer.steps(), state=state, tile=cut, engine=engine)

    def wanted() -> tuple[Tensor, Tensor]:
        wide = (z.float() for z in (b, c))
        return reference.scan(x.float(), dt, layer.A, *wide, **layer.steps(), state=state)

    moved = (tokens * (2 * INNER + 2 * SHARED + HEADS)) * x.element_size() + 2 * state.numel() * 4
    chunk = 64
    flops = 2.0 * tokens * HEADS * (chunk * STATE + chunk * DIM + 2 * STATE * DIM)
    yield Case(f"scan {tokens}", [call], call, wanted, moved, flops)


def _gated(options: Options) -> Iterator[Case]:
    layer, dtype, tokens = Layer.of(options.dtype), options.dtype, options.tokens
    gate, _, _ = split(normal(1, tokens, INNER + MIXED + HEADS, dtype=dtype))
    y = normal(1, tokens, INNER, dtype=dtype)

    def call(**tile: int) -> tuple[Tensor]:
        return (triton_norm.gated_rmsnorm(y, gate, layer.norm_weight, GROUPS, EPS, **tile),)

    def wanted() -> tuple[Tensor]:
        return (reference.gated_rmsnorm(y.float(), gate.float(), layer.norm_weight, GROUPS, EPS),)

    yield Case(f"gated {tokens}", [call], call, wanted, 3 * y.numel() * y.element_size())


def _step(options: Options) -> Iterator[Case]:
    layer, dtype = Layer.of(options.dtype), options.dtype
    sizes: dict[str, Any] = {"groups": GROUPS, "norm_groups": GROUPS, "eps": EPS, **layer.steps()}
    for batch in options.batches:
        moved = batch * (2 * HEADS * DIM * STATE * 4 + (2 * INNER + MIXED * TAPS) * 2)
        sets = [
            (
                normal(batch, INNER + MIXED + HEADS, dtype=dtype), normal(batch, MIXED, TAPS - 1, dtype=dtype),
                normal(batch, HEADS, DIM, STATE, dtype=torch.float32),
            )
            for _ in range(rounds(moved / 2))
        ]  # fmt: skip

        def run(version: Any, projected: Tensor, conv: Tensor, state: Tensor, **tile: Any) -> Tensor:
            weights = (layer.conv_weight, layer.conv_bias, conv, layer.A, state, layer.norm_weight)
            return version.mixer_step(projected, *weights, **sizes, **tile)  # type: ignore[no-any-return]

        def bound(one: tuple[Tensor, ...], run: Any = run) -> Callable[..., Tensor]:
            def call(**tile: int) -> Tensor:
                early = {"early": bool(tile.pop("early"))} if "early" in tile else {}
                return run(triton_decode, *one, **tile, **early)  # type: ignore[no-any-return]

            return call

        def found(run: Any = run, sets: Any = sets, **tile: int) -> tuple[Tensor, ...]:
            projected, conv, state = (z.clone() for z in sets[0])
            return run(triton_decode, projected, conv, state, **tile), conv, state

        def wanted(run: Any = run, sets: Any = sets) -> tuple[Tensor, ...]:
            projected, conv, state = (z.float() if z.dtype == dtype else z.clone() for z in sets[0])
            return run(reference, projected, conv, state), conv, state

        yield Case(f"step batch {batch}", [bound(one) for one in sets], found, wanted, moved, graph=True)


def _norm(options: Options) -> Iterator[Case]:
    for rows in (options.tokens, *options.batches):
        weight = normal(HIDDEN, dtype=options.dtype, scale=0.1, shift=1.0)
        moved = 4 * rows * HIDDEN * weight.element_size()
        sets = [
            (normal(rows, HIDDEN, dtype=options.dtype), normal(rows, HIDDEN, dtype=options.dtype))
            for _ in range(rounds(moved))
        ]

        def bound(pair: tuple[Tensor, Tensor], weight: Tensor = weight) -> Callable[..., tuple[Tensor, Tensor]]:
            return lambda **tile: norm_kernels.rmsnorm(pair[0], weight, EPS, pair[1], **tile)

        def wanted(pair: tuple[Tensor, Tensor] = sets[0], weight: Tensor = weight) -> tuple[Tensor, Tensor]:
            return norm_reference.rmsnorm(pair[0].float(), weight.float(), EPS, pair[1].float())

        graph = rows != options.tokens
        yield Case(f"norm {rows}", [bound(pair) for pair in sets], bound(sets[0]), wanted, moved, graph=graph)


MAKERS: dict[str, Callable[[Options], Iterator[Case]]] = {
    "conv": _conv, "scan": _scan, "gated": _gated, "step": _step, "norm": _norm,
}  # fmt: skip
