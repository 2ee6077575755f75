"""How long a context can be: the longest that fits a device, by mechanism and KV format, and curves up to there.

It asks the same memory model as a plan, without the rotated keys that a KV budget leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longspan.planner import formats
from longspan.planner.memory import mechanism
from longspan.planner.plan import Asked

MOST = 10**12
"""Tokens from which on a context counts as unlimited."""
KV = ("own", "fp8", "int8", "int4")
"""Formats that are compared; `own`: the type that the model computes in."""

_ALIKE = 0.05
"""Curves that differ by no larger a share are drawn as one."""


@dataclass(frozen=True)
class Longest:
    """The longest contexts of one mechanism."""

    attention: str
    exact: bool
    bounded: bool
    """Whether what it keeps stops growing."""
    tokens: dict[str, int | None]
    """By format; None: no limit."""

    def told(self) -> dict[str, Any]:
        """Return it for JSON: null is no limit."""
        return {"attention": self.attention, "exact": self.exact, "longest": self.tokens}


def mechanisms(asked: Asked) -> list[str]:
    """Return the mechanisms that are compared: all of the registry, and what was asked for in its own options first."""
    from longspan.attention import names

    return list(dict.fromkeys([asked.attention, *names()]))


def kv_formats(asked: Asked) -> list[str]:
    """Return the formats that are compared: the model's own type, and narrower ones."""
    own = formats.kv("auto", asked.weights)
    return list(dict.fromkeys([own, *KV[1:], asked.kv]))


def longest(asked: Asked) -> list[Longest]:
    """Return the longest context for every mechanism and format, with all else as it was asked for."""
    found = []
    for spec in mechanisms(asked):
        chosen = mechanism(spec)
        placed = replace(asked, attention=spec, rotated=False)
        by = {kv: _longest(replace(placed, kv=kv)) for kv in kv_formats(asked)}
        found.append(Longest(spec, chosen.exact, chosen.bounded_memory, by))
    return found


def _longest(asked: Asked) -> int | None:
    """Return the longest context that fits, 0 if none does; None: as long as one likes."""
    room = asked.device.memory

    def fits(n: int) -> bool:
        return replace(asked, context=n).memory().total <= room

    if not fits(1):
        return 0
    if fits(MOST):
        return None
    low, high = 1, MOST
    # To a thousandth: nobody plans for more digits.
    while high - low > max(1, low // 1000):
        middle = round((low * high) ** 0.5) if high > 2 * low else (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def contexts(asked: Asked) -> list[int]:
    """Return lengths for a curve: from 1,000 to beyond what was asked for and what fits, four a factor of ten."""
    reach = max(4 * asked.context, 2 * (_longest(replace(asked, rotated=False)) or 0), 100_000)
    count = math.ceil(4 * math.log10(min(reach, 10**9) / 1000))
    return [round(1000 * 10 ** (i / 4)) for i in range(count + 1)]


def by_mechanism(asked: Asked, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Return the bytes that contexts need, by mechanisms; those that need nearly the same share one curve."""
    curves: list[tuple[list[str], list[float]]] = []
    for spec in mechanisms(asked):
        own = _curve(replace(asked, attention=spec), lengths)
        alike = (
            names for names, values in curves
            if all(abs(a - b) <= _ALIKE * b for a, b in zip(own, values, strict=True))
        )  # fmt: skip
        if (names := next(alike, None)) is not None:
            names.append(spec)
        else:
            curves.append(([spec], own))
    return {", ".join(names): values for names, values in curves}


def by_format(asked: Asked, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Return the bytes that contexts need, by KV format."""
    return {kv: _curve(replace(asked, kv=kv), lengths) for kv in kv_formats(asked)}


def _curve(asked: Asked, lengths: Sequence[int]) -> list[float]:
    return [replace(asked, rotated=False, context=n).memory().total for n in lengths]
