"""Pages of one plane that are still in a file: each comes when it is read, or before that in the background.

A slot is its page's from the start, counted and in the page table; only what it holds is not there yet. Whoever reads a
plane asks for the slots first (`Coming.need`), which costs nothing once all are there. A page is checked when it comes:
one that is damaged raises where it is read, and never counts as there. Keys and values come apart: what only looks at
keys reads no values.
`Arrivals` brings the rest, in the order of the layers, once nobody has waited for a page for a moment: the first answer
comes first. It does not know files (`Rows` reads them), nor which page of which context a slot holds.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 2**20
"""Bytes that are read together: what a core's own cache holds until they are checked and copied."""
_GAP = 2**17
"""Bytes between two pages that are asked for, which come along: a disk takes as long to look elsewhere."""
_QUIET = 0.05
"""Seconds without anybody waiting for a page after which the others are brought."""
_PATIENCE = 2.0
"""Seconds after which they are brought all the same."""
_THREADS = 2
"""In the background: one waits for the disk while memory is made for the other."""
_AWAY, _COMING, _HERE = 0, 1, 2


class Rows(Protocol):
    """A tensor `[heads, pages, ...]` in a file."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    @property
    def here(self) -> bool:
        """Whether it is in memory already."""
        ...

    def read(self, first: int, last: int) -> Tensor:
        """Return the pages `first .. last - 1`, `[heads, n, ...]`, in host memory, checked (SessionError)."""
        ...

    def read_into(self, first: int, last: int, target: Tensor, start: int) -> None:
        """Read those pages to the places from `start` on of a tensor on the CPU, which has no gaps (as `read`)."""
        ...


class Taking(Protocol):
    """The plane that pages come to."""

    tensors: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Here:
    """Rows of a tensor in memory."""

    tensor: Tensor
    here: ClassVar[bool] = True

    @property
    def shape(self) -> Sequence[int]:
        """See `Rows`."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """See `Rows`."""
        return self.tensor.dtype

    def read(self, first: int, last: int) -> Tensor:
        """See `Rows`."""
        return self.tensor[:, first:last]

    def read_into(self, first: int, last: int, target: Tensor, start: int) -> None:
        """See `Rows`."""
        target[:, start : start + last - first] = self.read(first, last)


def rows_in(tensors: Mapping[str, Tensor], name: str) -> Rows:
    """Return a tensor of pages, which stays in its file where `tensors` is read from one (KeyError: it has none)."""
    find: Callable[[str], Rows | None] | None = getattr(tensors, "rows", None)
    found = None if find is None else find(name)
    return Here(tensors[name]) if found is None else found


class Coming:
    """What of one plane's slots is not there yet. Any number of threads may ask for it."""

    def __init__(self, plane: Taking, rows: Mapping[str, Rows], slots: Sequence[int], count: int) -> None:
        """Begin with nothing there.

        Args:
            plane: that the pages come to.
            rows: by the name of the plane's tensor; a part (`k` or `v`) is a tensor and its scales.
            slots: of each page in them.
            count: slots that the plane has.
        """
        self._plane, self._rows = weakref.ref(plane), dict(rows)
        self._page = np.full(count, -1, np.int64)
        self._page[slots] = np.arange(len(slots))
        self._slots = np.array(slots, np.int64)
        self._parts = {part: [name for name in rows if name.startswith(part)] for part in ("k", "v")}
        self._state = {part: np.full(count, _HERE, np.int8) for part in self._parts}
        for state in self._state.values():
            state[slots] = _AWAY
        self._left = dict.fromkeys(self._parts, len(slots))
        nbytes = sum(math.prod(each.shape) * each.dtype.itemsize for each in rows.values())
        each = max(1, nbytes // (2 * max(1, len(slots))))
        self._together, self._gap = max(1, PIECE // each), 1 + _GAP // each
        self._lock = threading.Condition()
        self._bringing: dict[int, tuple[int, int]] = {}
        """The slots that each thread brings now."""
        self.waited = 0.0
        """When somebody last waited for a page (`time.monotonic`)."""
        self.wanted: set[str] = set()
        """Parts of which all will be read soon."""

    def left(self, part: str | None = None) -> int:
        """Return how many pages are not there yet, of `k`, of `v`, or of both together."""
        return sum(self._left.values()) if part is None else self._left[part]

    def need(self, slots: Iterable[int] | slice | Tensor | None, part: str) -> None:
        """Return once what slots hold of `k` or `v` is there; None: all of them.

        Raises as `Rows.read`: of what could not be read nothing counts as there.
        """
        if not self._left[part]:
            return
        asked = self._asked(slots)
        while self._bring(asked, part, wait=True):
            pass

    def some(self, part: str) -> bool:
        """Bring one piece of what is away; returns whether there was any (raises as `need`)."""
        return bool(self._left[part]) and self._bring(self._slots, part, wait=False)

    def forget(self, slots: Iterable[int]) -> None:
        """Leave slots alone that hold other pages from now on, or none."""
        gone = np.array([slot for slot in slots if slot < len(self._page)], np.int64)
        with self._lock:
            self._settled(gone)
            for part, state in self._state.items():
                self._left[part] -= int((state[gone] != _HERE).sum())
                state[gone] = _HERE

    @contextmanager
    def still(self) -> Iterator[None]:
        """Have no page come while the plane's memory moves."""
        with self._lock:
            self._settled(self._slots)
            yield

    def _settled(self, slots: NDArray[np.int64]) -> None:
        """Wait until no other thread brings any of these slots; the lock is held."""
        me = threading.get_ident()  # a context may be collected in the middle of bringing its pages
        while any(
            bool(((slots >= start) & (slots < stop)).any())
            for who, (start, stop) in self._bringing.items()
            if who != me
        ):
            self._lock.wait()

    def _asked(self, slots: Iterable[int] | slice | Tensor | None) -> NDArray[np.int64]:
        if slots is None:
            return self._slots
        if isinstance(slots, slice):
            return np.arange(slots.start, min(slots.stop, len(self._page)))
        found = np.unique(slots.cpu().numpy() if isinstance(slots, Tensor) else np.array(list(slots), np.int64))
        return found[(found >= 0) & (found < len(self._page))]

    def _bring(self, asked: NDArray[np.int64], part: str, wait: bool) -> bool:
        """Bring some pages that lie one after the other; returns whether more of those asked for may be away."""
        with self._lock:
            state = self._state[part]
            away = asked[state[asked] == _AWAY]
            if not len(away):
                if not wait or not (state[asked] == _COMING).any():
                    return False
                self._lock.wait()  # another thread brings them, or fails: then it is tried here
                return True
            if wait:
                self.waited = time.monotonic()
            start, stop = self._stretch(away)
            mine = state[start:stop] == _AWAY
            state[start:stop][mine] = _COMING
            self._bringing[threading.get_ident()] = start, stop
        came = False
        try:
            self._copy(part, start, mine)
            came = True
        finally:
            with self._lock:
                del self._bringing[threading.get_ident()]
                mine &= state[start:stop] == _COMING
                state[start:stop][mine] = _HERE if came else _AWAY
                self._left[part] -= int(mine.sum()) if came else 0
                if wait:
                    self.waited = time.monotonic()
                self._lock.notify_all()
        return True

    def _stretch(self, away: NDArray[np.int64]) -> tuple[int, int]:
        """Return the first of the slots that are away and those after it which lie behind it in the file as well."""
        steps, pages = np.diff(away), np.diff(self._page[away])
        breaks = np.flatnonzero((steps != pages) | (steps > self._gap) | (away[1:] - away[0] >= self._together))
        start, last = int(away[0]), int(away[breaks[0] if len(breaks) else -1])
        between = self._page[start : last + 1] - self._page[start] != np.arange(last + 1 - start)
        # Slots of nobody's, or of other pages, may lie between.
        return start, start + int(between.argmax()) if between.any() else last + 1

    def _copy(self, part: str, start: int, mine: NDArray[np.bool_]) -> None:
        """Write pages to their slots, those that are this thread's to bring."""
        first, last, plane = int(self._page[start]), int(self._page[start]) + len(mine), self._plane()
        which = None if mine.all() else torch.from_numpy(mine.nonzero()[0])
        for name in self._parts[part] if plane is not None else ():
            assert plane is not None, "its slots are taken"
            target = plane.tensors[name]
            if which is None and target.device.type == "cpu":
                self._rows[name].read_into(first, last, target, start)  # memory can't move: `still` waits for this
            elif which is None:
                target[:, start : start + len(mine)] = self._rows[name].read(first, last).to(target)
            else:
                target[:, which + start] = self._rows[name].read(first, last)[:, which].to(target)


class Arrivals:
    """Threads that bring the pages of a context's layers, behind whoever waits for some."""

    def __init__(self, coming: Sequence[Coming]) -> None:
        """Take what is away, in the order in which it will be read; threads end when all is there, or fail."""
        self._coming = [weakref.ref(each) for each in coming]
        self._began = time.monotonic()
        self._threads = [
            threading.Thread(target=self._work, name="longspan-restore", daemon=True) for _ in range(_THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until they have ended."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            while (away := self._away()) is not None:
                # Only what somebody is sure to read next does not wait for its turn.
                mine = next((each for each in away if each[0].wanted & {each[1]}), None)
                if mine is None and self._quiet([coming for coming, _ in away]):
                    mine = away[0]
                done = mine is not None and mine[0].some(mine[1])
                del away, mine  # nobody's pages are kept for the sake of bringing them
                if not done:
                    time.sleep(_QUIET / 10)
        except Exception:  # who reads the page meets the fault itself
            return

    def _away(self) -> list[tuple[Coming, str]] | None:
        """Return which parts of which planes are not there, in order; None: all are, or nobody wants them any more."""
        alive = [coming for each in self._coming if (coming := each()) is not None]
        return [(coming, part) for coming in alive for part in ("k", "v") if coming.left(part)] or None

    def _quiet(self, coming: Sequence[Coming]) -> bool:
        now = time.monotonic()
        waited = max(each.waited for each in coming)
        return now - waited > _QUIET or now - self._began > _PATIENCE
