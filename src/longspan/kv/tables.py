"""A list of slots, one a page of a context, that knows which of them are neighbours and can be read as one view.

Contexts of millions of tokens have a hundred thousand pages a layer: whether a range is one stretch of memory is
looked up, not walked through.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

NATIVE = 1 << 40
"""Handles below this are slots of a pool's native plane (see `planes.py`)."""
DROPPED = -2
"""Stands for no slot. Not -1, which would make slot 0 its neighbour."""


class SlotTable:
    """Slots by page, in the order of the context."""

    def __init__(self, slots: Iterable[int] = ()) -> None:
        """Start with these slots."""
        self.slots = list(slots)
        self._others = sum(not 0 <= slot < NATIVE for slot in self.slots)
        self._breaks: list[int] | None = None
        self._tensor: Tensor | None = None
        self.version = 0
        """Changes whenever a page that was there has another slot, or is there no more."""

    def copy(self) -> SlotTable:
        """Return a table of the same slots."""
        other = SlotTable()
        other.slots, other._others = self.slots.copy(), self._others
        return other

    @property
    def plain(self) -> bool:
        """Whether every page is held, in the native plane."""
        return self._others == 0

    def native(self, first: int, last: int) -> bool:
        """Whether the pages `first .. last - 1` are all held in the native plane."""
        return self.plain or all(0 <= slot < NATIVE for slot in self.slots[first:last])

    def append(self, slot: int) -> None:
        """Add the slot of the next page."""
        if self._breaks is not None and self.slots and slot != self.slots[-1] + 1:
            self._breaks.append(len(self.slots))
        self.slots.append(slot)
        self._others += not 0 <= slot < NATIVE

    def cut(self, pages: int) -> None:
        """Forget every page from `pages` on."""
        if pages < len(self.slots):
            self._others -= self._others and sum(not 0 <= slot < NATIVE for slot in self.slots[pages:])
            del self.slots[pages:]
            self.version += 1
            # What stays is what it was: a long context is cut after every question.
            self._tensor = None if self._tensor is None else self._tensor[:pages]
            while self._breaks and self._breaks[-1] >= pages:
                self._breaks.pop()

    def put(self, page: int, slot: int) -> None:
        """Give a page another slot."""
        self._others += (not 0 <= slot < NATIVE) - (not 0 <= self.slots[page] < NATIVE)
        self.slots[page] = slot
        self._breaks = None
        self._changed()

    def move(self, moved: dict[int, int]) -> None:
        """Follow slots that were moved, from old to new."""
        self.slots = [moved.get(slot, slot) for slot in self.slots]
        self._breaks = None
        self._changed()

    def run(self, first: int, last: int) -> int | None:
        """Return the slot of page `first` if the pages `first .. last - 1` lie in neighbouring slots, else None."""
        breaks = self._ends()
        after = bisect.bisect_right(breaks, first)
        if after < len(breaks) and breaks[after] < last:
            return None
        return self.slots[first]

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the stretches of neighbouring slots among pages `first .. last - 1`, each as its ends."""
        breaks = self._ends()
        inner = breaks[bisect.bisect_right(breaks, first) : bisect.bisect_left(breaks, last)]
        return list(itertools.pairwise([first, *inner, last]))

    def _ends(self) -> list[int]:
        """Return the pages whose slot does not follow that of the page before."""
        if self._breaks is None:
            self._breaks = (np.flatnonzero(np.diff(np.array(self.slots, dtype=np.int64)) != 1) + 1).tolist()
        return self._breaks

    def tensor(self, device: torch.device) -> Tensor:
        """Return the slots as int64 `[pages]`; what was copied to a device before is not copied again."""
        held = self._tensor
        if held is None or held.shape[0] < len(self.slots):
            start = 0 if held is None else held.shape[0]
            new = torch.tensor(self.slots[start:], dtype=torch.int64, device=device)
            held = self._tensor = new if held is None else torch.cat([held, new])
        return held

    def _changed(self) -> None:
        self._tensor = None
        self.version += 1
