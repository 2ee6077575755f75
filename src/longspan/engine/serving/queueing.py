"""Whose turn it is: fair among keys by the tokens that each was served, in order within a session.

Every key has a counter of tokens served, written ones weighing more; the key with the least is next (virtual token
counters, Sheng et al. 2024, arXiv 2401.00588). A key that comes back does not bring the time of its absence: its
counter is lifted to the least of those that are there. Priorities go before counters. It does not know what a turn is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

WRITTEN = 2.0
"""What a written token weighs against one that is read."""


class Queued(Protocol):
    """What waits for its turn."""

    @property
    def key(self) -> str:
        """Whose it is."""
        ...

    @property
    def priority(self) -> int:
        """Higher ones go first."""
        ...

    @property
    def session(self) -> str | None:
        """What it needs for itself; None: nothing."""
        ...


_Q = TypeVar("_Q", bound=Queued)


class FairQueue(Generic[_Q]):
    """What waits, by key; and what was served."""

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: dict[str, deque[_Q]] = {}
        self._served: Counter[str] = Counter()
        self._under_way: Counter[str] = Counter()
        self.busy: set[str] = set()
        """Sessions that somebody has for himself."""

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[_Q]:
        """Go over all that wait."""
        for each in self._waiting.values():
            yield from each

    def put(self, item: _Q) -> None:
        """Queue an item behind all others of its key."""
        if item.key not in self._waiting and not self._under_way[item.key]:
            there = {*self._waiting, *(key for key, count in self._under_way.items() if count)}
            least = min((self._served[key] for key in there), default=0)
            self._served[item.key] = max(self._served[item.key], least)
        self._waiting.setdefault(item.key, deque()).append(item)

    def remove(self, item: _Q) -> None:
        """Take an item out wherever it waits (ValueError: it does not)."""
        self._waiting.get(item.key, deque()).remove(item)
        self._tidy(item.key)

    def take(self, fits: Callable[[_Q], bool | None]) -> _Q | None:
        """Take out whose turn it is, of those whose session is free and that fit; None: nobody's.

        Args:
            fits: whether there is room for an item. False: it waits, and nobody of its key goes before it; None: it
                waits, and those behind it may.
        """
        ordered = {key: sorted(items, key=lambda each: -each.priority) for key, items in self._waiting.items()}
        for key in sorted(ordered, key=lambda key: (-ordered[key][0].priority, self._served[key])):
            claimed = set(self.busy)
            for item in ordered[key]:
                if item.session is not None and item.session in claimed:
                    continue
                verdict = fits(item)
                if verdict:
                    self.remove(item)
                    self._under_way[key] += 1
                    if item.session is not None:
                        self.busy.add(item.session)
                    return item
                if verdict is False:
                    break
                if item.session is not None:
                    claimed.add(item.session)  # later ones on it come after
        return None

    def least_served(self, items: Iterable[_Q]) -> list[_Q]:
        """Return those of the items whose turn it is: of the highest priority, and of the key that has had least."""
        there = list(items)
        best = min((-item.priority, self._served[item.key]) for item in there)
        return [item for item in there if (-item.priority, self._served[item.key]) == best]

    def serve(self, key: str, tokens: float) -> None:
        """Count what a key was served."""
        self._served[key] += tokens  # type: ignore[assignment]

    def done(self, item: _Q) -> None:
        """Say that an item that was taken has ended: its session is free."""
        self._under_way[item.key] -= 1
        if item.session is not None:
            self.busy.discard(item.session)
        self._tidy(item.key)

    def _tidy(self, key: str) -> None:
        if not self._waiting.get(key, True):
            del self._waiting[key]
        if not self._under_way[key]:
            del self._under_way[key]
        # Keys that are not there any more are forgotten once nobody is: counters only compare those that are.
        if not self._waiting and not self._under_way:
            self._served.clear()
