"""Means with 95 % intervals by bootstrap, and what they need to be honest on few questions.

An interval is the percentile bootstrap (Efron 1979): questions are drawn with replacement 4,000 times, and the means'
2.5 and 97.5 percentiles are its ends. Draws are seeded and made on sorted values, so that the same scores give the same
interval in any order. It does not know what is scored.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

_DRAWS = 4000
_AT_ONCE = 1 << 22
"""Numbers drawn at once: 32 MB."""
_Z = 1.959963984540054
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True)
class Interval:
    """A mean, its 95 % interval, and how many values it is of."""

    mean: float
    low: float
    high: float
    count: int


def interval(
    values: Sequence[float], least: float | None = 0.0, most: float | None = 1.0, *, seed: int = 0
) -> Interval:
    """Return the mean of values, each of one question, and its bootstrap interval.

    Values that are all the same are the same in every draw. How far the mean may be from them is then Wilson's limit
    (1927) for none of so many, as a share of the way to `least` and `most`: 20 right answers of 20 give 84 % to 100 %.

    Args:
        values: at least one.
        least: that a value can be; None: it has no bound, and nothing is known beyond values that are all the same.
        most: that a value can be, or None.
        seed: of the draws.
    """
    found = np.sort(np.asarray(values, dtype=np.float64))
    count, mean = len(found), float(found.mean())
    if found[0] == found[-1]:
        share = _Z**2 / (count + _Z**2)
        low = mean if least is None else mean - share * (mean - least)
        return Interval(mean, low, mean if most is None else mean + share * (most - mean), count)
    rng, means, left = np.random.default_rng(seed), [], _DRAWS
    while left:
        now = min(left, max(1, _AT_ONCE // count))
        means.append(found[rng.integers(0, count, (now, count))].mean(1))
        left -= now
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    # A very skewed draw may leave the mean itself outside.
    return Interval(mean, min(mean, float(low)), max(mean, float(high)), count)


def averaged(parts: Sequence[Interval]) -> Interval:
    """Return the mean of independent means, each counted once, and its interval.

    The distances of the parts' ends from their means are added in squares (Zou and Donner 2008, "Construction of
    confidence limits about effect measures: a general approach"), so that a part of one question keeps its width,
    which a bootstrap within the parts would lose.
    """
    count = len(parts)
    mean = sum(part.mean for part in parts) / count
    low = mean - math.sqrt(sum((part.mean - part.low) ** 2 for part in parts)) / count
    high = mean + math.sqrt(sum((part.high - part.mean) ** 2 for part in parts)) / count
    return Interval(mean, low, high, sum(part.count for part in parts))


def shared(
    parts: Sequence[Mapping[Hashable, float]], least: float | None = 0.0, most: float | None = 1.0
) -> Interval | None:
    """Return the mean of parts that ask the same questions, and its interval.

    Such parts rise and fall together, so that adding squares would promise too much: questions are drawn, each with its
    mean over all parts. Those that a part lacks are left out.

    Args:
        parts: of each, values by question.
        least: see `interval`.
        most: see `interval`.

    Returns:
        None: there is no question that all parts have.
    """
    questions = set.intersection(*(set(part) for part in parts))
    if not questions:
        return None
    found = interval([sum(part[question] for part in parts) / len(parts) for question in questions], least, most)
    return replace(found, count=found.count * len(parts))
