"""What attention over ranks must give, row by row in float64: outputs are checked against it before anything is timed.

Written from the equations: every rank takes the exponentials of a row over the keys it holds, and sums of all ranks are
divided once. It shares no code with the schemes; the numbers of ranks meet in a plain gather.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.bench.parallel.inputs import Inputs
from longspan.distributed.group import Group
from longspan.distributed.layout import Run

Seen = Callable[[int, Tensor], Tensor]
"""For a query's position and keys' positions, which of these it sees."""

_BLOCK = 1 << 18
"""Keys that are read at a time: 268 MB in float64 for a head size of 128."""


@dataclass(frozen=True)
class Row:
    """One query of one head."""

    head: int
    position: int


def causal(position: int, keys: Tensor) -> Tensor:
    """Every key up to the query's own."""
    return keys <= position


def rows_of(heads: int, length: int, ranks: int, seed: int, count: int = 16) -> list[Row]:
    """Return about `count` rows: the ends, those where ranks' shares meet, and random ones, over all heads."""
    rng = random.Random(seed)
    edges = {length * part // (2 * ranks) + step for part in range(2 * ranks + 1) for step in (-1, 0)}
    at = rng.sample(sorted(e for e in edges if 0 <= e < length), min(count // 2, sum(0 <= e < length for e in edges)))
    at = sorted({0, length - 1, *at})
    at += [rng.randrange(length) for _ in range(count - len(at))]
    return [Row(rng.randrange(heads), position) for position in at]


def attended(
    group: Group, inputs: Inputs, rows: Sequence[Row], held: Sequence[Run], k: Tensor, v: Tensor, seen: Seen
) -> Tensor:
    """Return what rows must be, float64 `[R, D]`, the same on every rank.

    Args:
        group: the ranks; all of them must call it.
        inputs: whose queries they are.
        rows: which rows.
        held: positions of this rank's keys; no two ranks hold one position.
        k: this rank's keys `[1, Hkv, N, D]`.
        v: this rank's values.
        seen: what a query sees.
    """
    at = [torch.arange(start, stop, device=k.device) for start, stop in held]
    positions = torch.cat(at) if at else torch.zeros(0, dtype=torch.int64, device=k.device)
    parts = []
    for row in rows:
        q = inputs.at("q", [(row.position, row.position + 1)])[0, row.head, 0].double() / inputs.head_dim**0.5
        head = row.head // (inputs.heads // inputs.kv_heads)
        scores = torch.cat(
            [k.new_empty(0, dtype=torch.float64)]
            + [k[0, head, i : i + _BLOCK].double() @ q for i in range(0, k.shape[2], _BLOCK)]
        ).masked_fill(~seen(row.position, positions), -torch.inf)
        top = group.reduce(scores.max().clone() if len(scores) else scores.new_full((), -torch.inf), "max")
        weights = torch.exp(scores - top)
        out = scores.new_zeros(inputs.head_dim)
        for i in range(0, k.shape[2], _BLOCK):
            out += weights[i : i + _BLOCK] @ v[0, head, i : i + _BLOCK].double()
        parts.append(torch.cat([out, weights.sum().view(1)]))
    total = group.gather(torch.stack(parts)).sum(0)
    return total[:, :-1] / total[:, -1:]


def error(
    group: Group, out: Tensor, rows: Sequence[Row], own: Sequence[Run], wanted: Tensor
) -> tuple[float, int]:  # fmt: skip
    """Return the greatest distance of a row from the truth over its length, over all ranks, and how many were there.

    Args:
        group: the ranks.
        out: this rank's outputs `[1, Hq, T, D]` of the positions `own`.
        rows: as for `attended`.
        own: see out.
        wanted: what `attended` returned.
    """
    worst, found = 0.0, 0
    for row, exact in zip(rows, wanted, strict=True):
        first = 0
        for start, stop in own:
            if start <= row.position < stop:
                given = out[0, row.head, first + row.position - start].double()
                distance = float((given - exact).norm() / exact.norm())
                worst = distance if not distance <= worst else worst  # NaN stays
                found += 1
            first += stop - start
    worst = torch.inf if math.isnan(worst) else worst
    told = torch.tensor([worst, float(found)], dtype=torch.float64, device=out.device)
    return float(group.reduce(told[:1].clone(), "max")), int(group.reduce(told[1:].clone()))
