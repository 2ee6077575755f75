"""Scores from 0 to 1, and how far to trust their means.

`all` and `any` are RULER's `string_match_all` and `string_match_part` (arXiv 2404.06654): text is looked for anywhere
in an answer, case aside, and control characters, line breaks among them, count as line breaks. `sequence` is MRCR's:
the answer must begin with the first output, and the ratio of difflib's SequenceMatcher to the second one counts of the
rest. `probability` scores no answer: it is the geometric mean of the probability that a model gives to each token of a
text. It does not know tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

_CONTROL = re.compile(r"[\x00-\x1f]")
_Z = 1.959963984540054
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, from 0 to 1."""

    mean: float
    low: float
    high: float


def score(answer: str, outputs: Sequence[str], scoring: str) -> float:
    """Return the score of an answer: `outputs` are held against it as `scoring`, a name of `SCORINGS`, says.

    Where there are none, nothing is right.
    """
    return 0.0 if not outputs else SCORINGS[scoring](answer, outputs)


def _all(answer: str, outputs: Sequence[str]) -> float:
    """Return the share of outputs that the answer contains."""
    found = _found(answer, outputs)
    return sum(found) / len(found)


def _any(answer: str, outputs: Sequence[str]) -> float:
    """Return 1 if the answer contains any of the outputs."""
    return float(any(_found(answer, outputs)))


def _found(answer: str, outputs: Sequence[str]) -> list[bool]:
    text = _CONTROL.sub("\n", answer).casefold()
    return [output.casefold() in text for output in outputs]


def _sequence(answer: str, outputs: Sequence[str]) -> float:
    """Return how alike the answer is to the second output, where it begins with the first; 0 where it does not."""
    first, wanted = outputs
    told = answer.lstrip()
    if not told.startswith(first):
        return 0.0
    return SequenceMatcher(None, told.removeprefix(first).strip(), wanted.strip()).ratio()


SCORINGS: dict[str, Callable[[str, Sequence[str]], float]] = {"all": _all, "any": _any, "sequence": _sequence}
"""How an answer is held against outputs, by name; what is not asked (`probability`) is none of them."""


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
