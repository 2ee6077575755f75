"""As much haystack as a length holds, and units of haystack that are drawn as they are needed.

It does not know what a unit is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

_PROBE = 32
"""Units beyond the fewest that tell what one takes."""

T = TypeVar("T")


def fill(tokens: Callable[[int], int], limit: int, least: int) -> int | None:
    """Return the most units whose text fits, one more of which does not; None: not even `least` do.

    Tokens grow nearly in proportion to units, so each step goes to where a line through what is known reaches the
    limit: about ten texts are split into tokens, whatever the length.

    Args:
        tokens: of a text with so many units; it grows with them.
        limit: tokens that the text may have.
        least: units to begin with.
    """
    fits, used = least, tokens(least)
    if used > limit:
        return None
    beyond, more = least + _PROBE, tokens(least + _PROBE)
    while more <= limit:
        pace = max((more - used) / (beyond - fits), 1e-6)
        fits, used = beyond, more
        beyond = fits + max(1, round(1.02 * (limit - used) / pace))
        more = tokens(beyond)
    while beyond - fits > 1:
        guess = fits + int((limit - used) / (more - used) * (beyond - fits))
        guess = min(max(guess, fits + 1), beyond - 1)
        count = tokens(guess)
        if count <= limit:
            fits, used = guess, count
        else:
            beyond, more = guess, count
    return fits


class Drawn(Generic[T]):
    """Things of a source that may be endless, drawn once and kept, so that more of them begin as fewer did."""

    def __init__(self, source: Iterator[T]) -> None:
        """Draw nothing yet."""
        self._source = source
        self._kept: list[T] = []

    def first(self, count: int) -> list[T]:
        """Return the first so many, or all where the source holds fewer."""
        self._kept.extend(islice(self._source, max(0, count - len(self._kept))))
        return self._kept[:count]
