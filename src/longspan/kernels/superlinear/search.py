"""What a superlinear search is made of: its numbers, and the one table of anchors that every path reads."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_OFFSETS: dict[float, list[int]] = {}


def offsets(power: float, limit: int) -> list[int]:
    """Return the one table of `floor(i^(1/power))` for i = 1, 2, ..., grown to pass `limit`.

    Every path reads this table, so that prefill and decode agree at any length. Where 1/power is a whole number the
    entries are computed in integers, otherwise in float64.
    """
    table = _OFFSETS.setdefault(power, [])
    exponent = 1.0 / power
    while not table or table[-1] <= limit:
        i = len(table) + 1
        table.append(i ** round(exponent) if exponent.is_integer() else math.floor(i**exponent))
    return table


@dataclass(frozen=True)
class Search:
    """The options of `superlinear` that kernels need (`attention/superlinear.py` says what each means)."""

    window: int
    """Rounded up to an anchor already."""
    spans: int = 3
    backward: float = 3.0
    forward: float = 1.0
    power: float = 0.5
    span_power: float = 0.5
    gate: str = "joint"
    sinks: int = 0
    share: str = "head"

    def first_anchor(self) -> int:
        """Return the least i whose anchor lies outside the window."""
        return bisect.bisect_left(offsets(self.power, self.window + 1), self.window + 1) + 1

    def reach(self, n: int) -> tuple[int, int]:
        """Return how many keys before and after its anchor a span has, for a query that sees n keys."""
        length = float(n) ** self.span_power
        return math.ceil(self.backward * length), math.ceil(self.forward * length)

    def longest(self, n: int) -> int:
        """Return the most keys that one span of a query that sees n keys can have."""
        return min(n, sum(self.reach(n)) + 1)

    def steps(self, n: int, device: torch.device) -> Tensor:
        """Return how far before the end each anchor lies, int32 `[A]`, nearest first: `a_i = n - steps[i]`.

        Args:
            n: keys that the query sees at most; anchors that even it has not are left out.
            device: where the table is wanted.
        """
        first, table = self.first_anchor(), offsets(self.power, n)
        # One table a power of two: a captured graph reads it for as long as it lives, and so it must stay.
        whole = _steps(self.power, first, 1 << max(0, n - 1).bit_length(), str(device))
        return whole[: max(0, bisect.bisect_right(table, n) - first + 1)]


@dataclass(frozen=True)
class Turn:
    """How queries are rotated, where keys are held rotated to their own positions.

    Up to the trained length everything is read at its true position; beyond it, each span (and the sinks) as if it
    stood directly before the window.
    """

    per_token: Tensor
    """float64 `[R / 2]`: turns a token of each pair of channels; channel i is paired with i + R / 2."""
    trained: int
    """Tokens that the model was trained on."""


@functools.lru_cache(maxsize=1024)
def _steps(power: float, first: int, n: int, device: str) -> Tensor:
    table = offsets(power, n)
    return torch.tensor(table[first - 1 : bisect.bisect_right(table, n)], dtype=torch.int32, device=device)
