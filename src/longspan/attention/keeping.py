"""Which rows stay, given their scores: the first and the newest ones, and the best of the others.

Heads keep equally many, or those of a layer or of all layers share one sum: each keeps its own best up to a safe share
of the budget, and what is left goes to the best rows of all of them together (Ada-KV, arXiv 2407.11550, section 3.3,
which flattens the scores of all heads and keeps the highest). Of equal scores the older row stays, so that the choice
is the same everywhere.
It does not know what scores mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_to_keep(
    scores: Sequence[Tensor],
    count: int,
    *,
    sinks: int,
    window: int,
    safeguard: float | None = None,
    most: int | None = None,
    unit: int = 1,
) -> list[Tensor]:
    """Choose the rows that stay.

    Args:
        scores: `[heads, rows]` a group of heads that hold equally many rows.
        count: rows that a head keeps (on average, where shares differ); at least `sinks + window`.
        sinks: first rows that stay whatever their scores.
        window: newest rows that stay whatever their scores.
        safeguard: share of `count` that each head keeps for sure, groups being one head each; None: all of it.
        most: rows that one head may keep at most; None: any number.
        unit: rows that a head whose share differs keeps a multiple of, where it has so many.

    Returns:
        A group's rows, int64 `[heads, kept]`, ascending. Rows that score NaN stay before all others.
    """
    assert count >= sinks + window, "too few rows are kept to hold sinks and window"
    ranked = [_ranked(one, sinks, window) for one in scores]
    if safeguard is None:
        return [order[:, :count].sort(1).values for order in ranked]
    assert all(one.shape[0] == 1 for one in scores), "heads whose shares differ are held apart"
    limit = max(one.shape[1] for one in scores) if most is None else most
    safe = min(max(int(safeguard * count), sinks + window), limit)
    # What the heads did not take for sure, in their own order; the best of it fills the sum.
    rest = [one[0, order[0, safe:limit]] for one, order in zip(scores, ranked, strict=True)]
    left = count * len(scores) - sum(min(safe, one.shape[1]) for one in scores)
    owner = torch.cat([torch.full((one.numel(),), i, device=one.device) for i, one in enumerate(rest)])
    best = torch.cat(rest).sort(descending=True, stable=True).indices[: max(0, left)]
    # A head's candidates stand in the order of their scores: as many as were chosen are its first ones.
    extra = torch.bincount(owner[best], minlength=len(scores)).tolist()
    kept = [min(safe + more, one.shape[1]) for one, more in zip(scores, extra, strict=True)]
    kept = _in_units(kept, unit, [min(limit, one.shape[1]) for one in scores])
    return [order[:, :rows].sort(1).values for order, rows in zip(ranked, kept, strict=True)]


def _in_units(counts: list[int], unit: int, limits: list[int]) -> list[int]:
    """Return counts in multiples of a unit, at least one each, whose sum is as great or, if that can't be, the least.

    What lacks most of the next unit is rounded down; where small heads need more than their own, the largest give it.
    """
    if unit == 1:
        return counts
    units = [count // unit for count in counts]
    left = sum(counts) // unit - sum(units)
    for i in sorted(range(len(counts)), key=lambda i: -(counts[i] % unit)):
        if left and (units[i] + 1) * unit <= limits[i]:
            units[i] += 1
            left -= 1
    units = [max(1, each) for each in units]
    for _ in range(sum(units) - sum(counts) // unit):
        largest = max(range(len(units)), key=units.__getitem__)
        units[largest] = max(1, units[largest] - 1)
    return [each * unit for each in units]


def _ranked(scores: Tensor, sinks: int, window: int) -> Tensor:
    """Return the rows `[heads, rows]`, best first, sinks and window before all others."""
    greatest, rows = torch.finfo(scores.dtype).max, scores.shape[1]
    # NaN is no reason to forget a row: whoever reads it must see that it is NaN.
    scores = scores.nan_to_num(nan=greatest, posinf=greatest, neginf=-greatest)
    scores[:, : min(sinks, rows)] = float("inf")
    scores[:, max(0, rows - window) :] = float("inf")
    return scores.sort(dim=1, descending=True, stable=True).indices
