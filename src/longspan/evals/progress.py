"""How far an eval is: questions asked, the running score, and about how long the rest takes.

Reading and asking are timed apart, because a context is read once and asked many times. It does not know what is read
or asked; the time left is a guess where contexts of several lengths or mechanisms take turns.
"""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """Tells a line a question."""

    def __init__(self, questions: int, tokens: int, say: Callable[[str], None]) -> None:
        """Begin.

        Args:
            questions: to be asked in all, with those that were answered before.
            tokens: still to be read.
            say: told each line.
        """
        self._questions, self._tokens, self._say = questions, tokens, say
        self._scores: dict[str, tuple[int, int]] = {}
        self._done = self._asked = self._read = 0
        self._asking = self._reading = 0.0

    def before(self, group: str, right: bool) -> None:
        """Count a question that was answered in an earlier run."""
        hits, count = self._scores.get(group, (0, 0))
        self._scores[group] = (hits + right, count + 1)
        self._done += 1

    def read(self, tokens: int, seconds: float) -> None:
        """Count a context that was read."""
        self._tokens -= tokens
        self._read += tokens
        self._reading += seconds

    def asked(self, group: str, right: bool, seconds: float) -> None:
        """Count an answer, and tell how far it is."""
        self.before(group, right)
        self._asked += 1
        self._asking += seconds
        hits, count = self._scores[group]
        self._say(
            f"[{self._done}/{self._questions}] {group}: {hits}/{count} right, about {duration(self._left())} left"
        )

    def _left(self) -> float:
        """Return the seconds that the rest takes at the pace so far."""
        asking = self._asking / self._asked * (self._questions - self._done)
        reading = self._reading / self._read * self._tokens if self._read else 0.0
        return asking + reading


def duration(seconds: float) -> str:
    """Return a time in words, as exact as a guess deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
