"""RMSNorm, as `benchmarks.model_kernels` times it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.model_cases.frame import Case, Options, normal, rounds
from longspan.kernels.rmsnorm import reference as norm_reference
from longspan.kernels.rmsnorm import triton_kernels as norm_kernels

HIDDEN = 2688


def cases(what: str, options: Options) -> Iterator[Case]:
    """Make the cases of one name."""
    yield from MAKERS[what](options)


def _norm(options: Options) -> Iterator[Case]:
    size = torch.finfo(options.dtype).bits // 8
    for rows in (options.tokens, *options.batches):
        weight = normal(HIDDEN, dtype=options.dtype, scale=0.1, shift=1.0)
        moved = 4 * rows * HIDDEN * size
        sets = [
            (normal(rows, HIDDEN, dtype=options.dtype), normal(rows, HIDDEN, dtype=options.dtype))
            for _ in range(rounds(moved))
        ]

        def call(x: Tensor, residual: Tensor, weight: Tensor = weight, **tile: int) -> tuple[Tensor, Tensor]:
            return norm_kernels.rmsnorm(x, weight, 1e-5, residual, **tile)

        def one(x: Tensor, residual: Tensor) -> Callable[..., object]:
            return lambda call=call, **tile: call(x, residual, **tile)

        x, residual = sets[0]
        yield Case(
            f"norm {rows}x{HIDDEN}", [one(*pair) for pair in sets], one(x, residual),  # type: ignore[arg-type]
            lambda x=x, residual=residual, weight=weight: norm_reference.rmsnorm(  # type: ignore[misc]
                x.float(), weight.float(), 1e-5, residual.float()
            ),
            moved, graph=rows != options.tokens,
        )  # fmt: skip


MAKERS: dict[str, Callable[[Options], Iterator[Case]]] = {"norm": _norm}
