"""Outputs and gradients beside `truth.py`: a side that is wrong is not timed.

Rows are sampled: the first and last queries of a chunk, those around the edge of a tile, and random ones, over all
heads. All of an output must be finite, and its memory is filled with NaN first, so that what is never written shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.bench.attention import truth
from longspan.bench.attention.inputs import Inputs
from longspan.bench.attention.sides import Side
from longspan.bench.attention.truth import Row
from longspan.errors import LongspanError

_EDGES = (0, 1, 62, 63, 64, 127, 128)
_GRADIENT = 2.0
"""Gradients pass through two more products than outputs: their errors may be so many times as large."""


class WrongOutputError(LongspanError):
    """A side gives another result than the mathematics: there is no figure of it."""


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    error: float
    """The greatest error of a row over the row's length."""
    rows: int
    unsure: int
    """Rows left out, because float32 can't tell which anchor scores best."""

    def __add__(self, other: Checked) -> Checked:
        """Return both checks as one."""
        return Checked(max(self.error, other.error), self.rows + other.rows, self.unsure + other.unsure)


def rows_of(heads: int, queries: int, count: int, seed: int) -> list[Row]:
    """Return about `count` rows: edges, then random queries; heads in random order, all before one comes again."""
    rng = random.Random(seed)
    at = {i for edge in _EDGES for i in (edge, queries - 1 - edge) if 0 <= i < queries}
    chosen = sorted(at)[: count // 2] + sorted(at)[-(count // 2) :] if len(at) > count else sorted(at)
    chosen += [rng.randrange(queries) for _ in range(count - len(chosen))]
    order: list[int] = []
    while len(order) < len(chosen):
        order += rng.sample(range(heads), heads)
    return list(dict.fromkeys(Row(head, query) for head, query in zip(order, chosen, strict=False)))


def outputs(side: Side, inputs: Inputs, out: Tensor, rows: Sequence[Row]) -> Checked:
    """Compare sampled rows of an output with the truth.

    Args:
        side: whose output it is.
        inputs: what it attended to.
        out: `[1, Hq, T, D]`.
        rows: which rows.

    Raises:
        WrongOutputError: another shape, a number that is not finite, or a row that is wrong.
    """
    if out.shape != inputs.q.shape:
        raise WrongOutputError(f"{side.name} gives {tuple(out.shape)} in place of {tuple(inputs.q.shape)}: not timed")
    finite(side, out)
    with torch.no_grad():
        wanted, sure = truth.attended(side.truth, inputs, rows)
    found = torch.stack([out[0, row.head, row.query] for row in rows]).double()
    errors = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).cpu()[sure]
    worst = float(errors.max()) if len(errors) else 0.0
    _refuse(side, worst, side.tolerance(inputs.q.dtype), "output")
    return Checked(worst, len(errors), int((~sure).sum()))


def finite(side: Side, out: Tensor) -> None:
    """Refuse an output with any number that is not finite (WrongOutputError)."""
    if not bool(torch.isfinite(out).all()):
        raise WrongOutputError(f"{side.name} gives numbers that are not finite: not timed")


def gradients(side: Side, inputs: Inputs, rows: Sequence[Row], seed: int) -> Checked:
    """Compare gradients with the truth's, for an upstream gradient that is 0 but for sampled rows.

    Every gradient of q, k and v is compared as a whole: what other rows must not have got is compared too.

    Raises:
        WrongOutputError: none is given, or they are wrong.
    """
    with torch.no_grad():
        _, sure = truth.attended(side.truth, inputs, rows)
    kept = [row for row, is_sure in zip(rows, sure.tolist(), strict=True) if is_sure]
    generator = torch.Generator(inputs.q.device).manual_seed(seed)
    own = torch.randn(len(kept), inputs.q.shape[-1], generator=generator, device=inputs.q.device).to(inputs.q.dtype)
    leaves = leaves_of(inputs)
    out = side.prefill(leaves)()
    if not out.requires_grad:
        raise WrongOutputError(f"{side.name} gives no gradients here: leave backward out of --what")
    upstream = torch.zeros_like(out)
    for row, value in zip(kept, own, strict=True):
        upstream[0, row.head, row.query] = value
    found = torch.autograd.grad(out, (leaves.q, leaves.k, leaves.v), upstream)
    exact = leaves_of(Inputs(inputs.q.double(), inputs.k.double(), inputs.v.double()))
    wanted_rows, _ = truth.attended(side.truth, exact, kept)
    wanted = torch.autograd.grad((wanted_rows * own.double()).sum(), (exact.q, exact.k, exact.v))
    worst = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    _refuse(side, worst, _GRADIENT * side.tolerance(inputs.q.dtype), "gradient")
    return Checked(worst, len(kept), len(rows) - len(kept))


def leaves_of(inputs: Inputs) -> Inputs:
    """Return the same inputs, of which gradients are asked."""
    return replace(
        inputs, **{name: getattr(inputs, name).detach().clone().requires_grad_() for name in ("q", "k", "v")}
    )


def poison(inputs: Inputs) -> None:
    """Leave NaN in memory of an output's size, which an allocator that keeps what is freed gives out next."""
    torch.full_like(inputs.q, float("nan"))


def _refuse(side: Side, error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:
        raise WrongOutputError(
            f"{side.name}: a sampled {what} differs by {error:.2g} of its length (at most {tolerance:g}): not timed"
        )
