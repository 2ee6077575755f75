"""What a figure is: a score in percent, or a perplexity. How it is written and drawn, and what lies behind its mean.

It does not know where figures come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from longspan.evals.statistics import Interval


def _same(value: float) -> float:
    return value


def _hundredfold(value: float) -> float:
    return 100 * value


@dataclass(frozen=True)
class Scale:
    """How values of single questions become figures."""

    name: str
    title: str
    """Of an axis."""
    words: str
    """In a sentence."""
    least: float | None
    """That a value can be; None: it has no bound."""
    most: float | None
    shown: Callable[[float], float]
    """Turns a mean of values into the figure that people read."""
    digits: int
    difference: Callable[[float], float]
    """Turns a mean of differences of values into a figure."""
    difference_title: str

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """What a value can be."""
        return self.least, self.most

    @property
    def difference_bounds(self) -> tuple[float | None, float | None]:
        """What a difference of two values can be."""
        if self.least is None or self.most is None:
            return None, None
        return self.least - self.most, self.most - self.least

    def written(self, value: float) -> str:
        """Return a mean for people."""
        return number(self.shown(value), self.digits)

    def ends(self, found: Interval) -> str:
        """Return an interval for people."""
        digits = max(0, self.digits - 1)
        return f"{number(self.shown(found.low), digits)} to {number(self.shown(found.high), digits)}"


PERCENT = Scale("score", "score, %", "score in percent", 0.0, 1.0, _hundredfold, 1, _hundredfold, "points above")
PERPLEXITY = Scale(
    "perplexity", "perplexity", "perplexity", None, None, math.exp, 3, math.exp, "perplexity over that of"
)
"""Values are mean negative log-likelihoods of a text's tokens; differences of them become ratios of perplexities."""


def number(value: float, digits: int, sign: bool = False) -> str:
    """Return a number with so many digits after the point, a true minus, and no minus before zero."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")
