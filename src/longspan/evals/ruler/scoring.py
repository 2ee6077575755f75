"""Scores from 0 to 1, as RULER counts them, and how far to trust their means.

Matching looks for text anywhere in an answer, case aside. It does not know tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f]")
_Z = 1.959963984540054
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, from 0 to 1."""

    mean: float
    low: float
    high: float


def score(answer: str, outputs: Sequence[str], *, part: bool) -> float:
    """Return RULER's `string_match_part` (1 if any output is in the answer) or `string_match_all` (the share that is).

    Control characters, line breaks among them, count as line breaks.
    """
    text = _CONTROL.sub("\n", answer).casefold()
    found = [output.casefold() in text for output in outputs]
    return float(any(found)) if part else sum(found) / len(found)


def wilson(scores: Sequence[float]) -> Interval:
    """Return the mean and Wilson's interval (1927) for a share of right answers.

    A score in parts varies less than right or wrong with the same mean, so its interval is rather too wide.
    """
    count, mean = len(scores), sum(scores) / len(scores)
    within = _Z**2 / count
    middle = (mean + within / 2) / (1 + within)
    half = _Z / (1 + within) * math.sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    return Interval(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def averaged(parts: Sequence[Interval]) -> Interval:
    """Return the mean of several independent means, each counted once, and its interval.

    The distances of the parts' ends from their means are added in squares (Zou and Donner 2008, "Construction of
    confidence limits about effect measures: a general approach").
    """
    count = len(parts)
    mean = sum(part.mean for part in parts) / count
    low = mean - math.sqrt(sum((part.mean - part.low) ** 2 for part in parts)) / count
    high = mean + math.sqrt(sum((part.high - part.mean) ** 2 for part in parts)) / count
    return Interval(mean, max(0.0, low), min(1.0, high))
