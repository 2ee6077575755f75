"""How many tokens are read between two steps of decode, and how many answers share one, so that tokens come in time.

A step's time is known from the last ones. A chunk may take about as long: its size is doubled or halved until it does.
Where nobody is answered it is as large as the context likes. It does not know what is read, nor who is answered.
"""

from __future__ import annotations

SHARE = 1.2
"""How long a chunk may take, in steps of decode."""
LEAST, SOON, MOST = 4, 16, 1 << 15
"""Tokens of a chunk at least, of a short request's, and at most."""
_OLD = 0.9
_BEGIN, _GAIN = 4, 0.05
"""Answers at first, and by how much their number changes with a step."""


class Pace:
    """The size of chunks, from how long steps and chunks took."""

    def __init__(self, seconds: float | None = None) -> None:
        """Take how long a chunk may hold up answers; None: as long as their steps suggest."""
        self._seconds, self._step = seconds, 0.0
        self.tokens = LEAST
        """Of a chunk while answers are written."""
        self.answering = False
        """Whether answers are being written."""

    def most(self, *, short: bool = False) -> int:
        """Return how many tokens may be read together now; `short`: of a request that is about to be answered."""
        if not self.answering:
            return MOST
        return max(self.tokens, SOON) if short else self.tokens

    def stepped(self, seconds: float) -> None:
        """Learn how long a step took."""
        self._step = seconds if self._step == 0.0 else _OLD * self._step + (1 - _OLD) * seconds

    def read(self, tokens: int, seconds: float) -> None:
        """Learn how long a chunk took that was read while answers are written."""
        target = SHARE * self._step if self._seconds is None else self._seconds
        if not self.answering or target == 0.0:
            return
        if seconds > target:
            self.tokens = max(LEAST, min(self.tokens, tokens) // 2)
        elif seconds < target / 2 and tokens >= self.tokens:
            self.tokens = min(MOST, 2 * self.tokens)


class Crowd:
    """How many answers are written at once where their tokens are to come within a time on average.

    The number is lowered while steps, as they were lately, come too late, and raised while all who may be answered are
    and steps come in time. Who is being answered stays; one alone always is.
    """

    def __init__(self, seconds: float | None, most: int) -> None:
        """Take the time between two tokens of an answer (None: any), and how many are written at once at most."""
        self.seconds, self.most = seconds, most
        self.count = float(most if seconds is None else min(_BEGIN, most))
        self._lately = 0.0

    def fits(self, under_way: int, more: int) -> bool:
        """Whether so many more answers may be begun."""
        return not under_way or under_way + more <= (self.most if self.seconds is None else int(self.count))

    def stepped(self, seconds: float, answers: int) -> None:
        """Learn how long it was since the step before, in which so many answers had a token."""
        if self.seconds is None:
            return
        self._lately = seconds if self._lately == 0.0 else _OLD * self._lately + (1 - _OLD) * seconds
        if self._lately > self.seconds:
            self.count = max(1.0, min(self.count, answers + 1.0) - _GAIN)
        elif answers >= int(self.count):  # fewer say nothing of how it would be with more
            self.count = min(float(self.most), self.count + _GAIN)
