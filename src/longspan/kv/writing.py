"""Writing tokens into one context's pages: slots of its own, quantising what is old enough, summaries, bytes.

The steps that `pages.py` composes. None of them can fail for want of bytes: `_charge` is called first, with all the
slots that a change takes and gives back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from longspan.errors import PoolExhaustedError
from longspan.kv.base import PAGE
from longspan.kv.planes import Codes, PagePlane, Plane
from longspan.kv.reading import PageReader
from longspan.kv.records import RecordPlane
from longspan.kv.tables import DROPPED, NATIVE

Slots = Iterable[tuple[Plane, int]]


class PageWriter(PageReader):
    """What of a context changes with every token."""

    _committed: int
    rounded: set[int]
    """Pages of the native type whose first tokens went through a smaller format: their summaries are more exact."""

    def _referred(self) -> Iterable[tuple[Plane, int]]:
        """Every slot that this context refers to and pays for."""
        yield from (self.pool.find(handle) for handle in self.table if handle != DROPPED)
        yield from ((self.pool.marks, mark) for mark in self.blocks.table.slots if mark != DROPPED)

    def _referred_by_plane(self) -> dict[Plane, list[int]]:
        """Return the same slots by plane: a context of 100 thousand tokens has fifty thousand in a model's layers."""
        marks = self.blocks.table.slots
        found: dict[Plane, list[int]] = {self.pool.marks: [mark for mark in marks if mark != DROPPED]}
        if self.pages.plain:
            found[self.pool.native] = self.table
            return found
        for handle in self.table:
            if handle != DROPPED:
                plane, slot = self.pool.find(handle)
                found.setdefault(plane, []).append(slot)
        return found

    def _charge(self, takes: Mapping[Plane, int], gives: Slots, *, only_try: bool = False) -> None:
        """Count slots that will be taken and given back, before anything is changed (PoolExhaustedError).

        Args:
            takes: how many of each plane.
            gives: those that are given back.
            only_try: whether nothing is to be counted, since the steps of the change will do so.
        """
        referred = memory = sum(plane.page_bytes * count for plane, count in takes.items())
        for plane, slot in gives:
            referred -= plane.page_bytes
            if plane.references[slot] == 1:
                memory -= plane.page_bytes
        if referred or memory:
            self.budget.charge(referred, memory)
            if only_try:
                self.budget.charge(-referred, -memory)

    def _release(self, gone: Slots) -> None:
        by_plane: dict[Plane, list[int]] = {}
        for plane, slot in gone:
            by_plane.setdefault(plane, []).append(slot)
        for plane, slots in by_plane.items():
            plane.release(slots)

    def _let_go(self, gone: Sequence[tuple[Plane, int]]) -> None:
        self._charge({}, gone)
        self._release(gone)

    def _not_writable(self, page: int) -> list[Plane]:
        """Return in which planes a page needs a slot of its own before it can be continued: native, marks, or both."""
        pool, handle = self.pool, self.table[page]
        lacking: list[Plane] = []
        assert handle != DROPPED or page in self.exact, "the page being written was dropped"
        if not 0 <= handle < NATIVE or pool.native.references[handle] > 1:
            lacking.append(pool.native)
        if self.blocks.kept and pool.marks.references[self.blocks.table.slots[page]] > 1:
            lacking.append(pool.marks)
        return lacking

    def _replaced(self, page: int, reopened: list[Plane]) -> list[tuple[Plane, int]]:
        """Return the slots that `_reopen` gives back."""
        gone: list[tuple[Plane, int]] = []
        if self.pool.native in reopened and self.table[page] != DROPPED:
            gone.append(self.pool.find(self.table[page]))
        if self.pool.marks in reopened:
            gone.append((self.pool.marks, self.blocks.table.slots[page]))
        return gone

    def _reopen(self, page: int, reopened: list[Plane]) -> None:
        """Give a page that is not full slots of its own, with what it held (rounded, where only a rounding is left)."""
        gone = self._replaced(page, reopened)
        if self.pool.marks in reopened:
            (mark,) = self.pool.marks.take()
            self.pool.marks.copy(self.blocks.table.slots[page], mark)
            self.blocks.table.put(page, mark)
        if self.pool.native in reopened:
            (slot,) = self.pool.native.take()
            if page in self.exact:
                self._from_below(page, slot)
            else:
                if not 0 <= self.table[page] < NATIVE:
                    self.rounded.add(page)
                for what in ("k", "v"):
                    self.pool.native.write([slot], what, self.whole_pages(torch.tensor([page]), what))
            self.pages.put(page, slot)
        self._release(gone)

    def _write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Write k `[Hkv, n, D]` and v to the tokens from `start` on, whose pages are native and this context's own."""
        first, last = start // PAGE, -(-(start + k.shape[1]) // PAGE)
        if k.shape[1] == 0:
            return
        slot = self.pages.run(first, last)
        for what, rows in (("k", k), ("v", v)):
            held = self.pool.native.tensors[what]
            if last == first + 1:
                held[:, self.table[first], start % PAGE : start % PAGE + rows.shape[1]] = rows
                continue
            held = held.flatten(1, 2)
            if slot is not None:
                at = slot * PAGE + start % PAGE
                held[:, at : at + rows.shape[1]] = rows
            else:
                at_each = torch.arange(start, start + rows.shape[1], device=held.device)
                held[:, self.pages.tensor(held.device)[at_each // PAGE] * PAGE + at_each % PAGE] = rows

    def _old_enough(self, first: int, length: int) -> range:
        """Return the pages from `first` on that a context of `length` tokens holds in the pool's format."""
        made = self.pool.format
        if made is self.pool.native.format:
            return range(first, first)
        first = max(first, -(-made.sinks // PAGE))
        return range(first, max(first, (length - made.residual) // PAGE))

    def _write_down(self, first: int, length: int) -> int:
        """Write pages from `first` on in the pool's format, those that are old enough at `length`.

        Returns:
            The first page that is not old enough. Or `first`, where other contexts share the pages and the budget has
            no room for the smaller ones beside: then they stay as they are, which loses nothing but room.
        """
        old = self._old_enough(first, length)
        due = [page for page in old if 0 <= self.table[page] < NATIVE]
        if due:
            plane, gone = self.pool.plane(self.pool.format.name), [self.pool.find(self.table[page]) for page in due]
            try:
                self._charge({plane: len(due)}, gone)
            except PoolExhaustedError:
                return first
            self._recode(due, plane, {what: self.whole_pages(torch.tensor(due), what) for what in ("k", "v")})
            self._release(gone)
        return max(first, old.stop)

    def _recode(self, pages: Sequence[int], plane: PagePlane, numbers: Mapping[str, Tensor]) -> None:
        """Give pages new slots with these numbers `[Hkv, n, PAGE, D]`; those they had are the caller's to release."""
        slots = plane.take(len(pages))
        for what, rows in numbers.items():
            plane.write(slots, what, rows)
        for page, slot in zip(pages, slots, strict=True):
            self.pages.put(page, plane.handle(slot))
        self.mirror.clear()

    def _add_encoded(self, k: Tensor, v: Tensor, codes: Mapping[str, Codes]) -> None:
        """Add whole pages at once, k `[Hkv, n, D]`, in the pool's format; `codes`: see `PagedKV.replace`."""
        target, pages = self.pool.plane(self.pool.format.name), k.shape[1] // PAGE
        marks = pages if self.blocks.kept else 0
        self._charge({target: pages, self.pool.marks: marks}, ())
        for mark in self.pool.marks.take(marks):
            self.blocks.table.append(mark)
        if marks:
            self._summarise(k, v)
        slots = target.take(pages)
        for what, rows in (("k", k), ("v", v)):
            target.write(slots, what, rows.unflatten(1, (pages, PAGE)))
            if what in codes:
                target.put(slots, what, codes[what])
        for slot in slots:
            self.pages.append(target.handle(slot))
        self._length += pages * PAGE

    def _summarise(self, k: Tensor, v: Tensor) -> None:
        """Write the summaries of the blocks that k `[Hkv, n, D]` and v fill, which are not in their pages yet."""
        before, block = self._length, self.pool.block
        start = before // block * block
        if (before + k.shape[1]) // block == before // block:
            return
        if start < before:
            slot, begun = self.table[before // PAGE], slice(start % PAGE, before % PAGE)
            self.pool.native.need([slot])
            k = torch.cat([self.pool.keys[:, slot, begun], k], 1)
            v = torch.cat([self.pool.values[:, slot, begun], v], 1)
        self.blocks.write(self, start, k, v)

    def _from_below(self, page: int, slot: int) -> None:
        """Copy a page's copy below into a native slot, and give the copy up."""
        for what in ("k", "v"):
            self.pool.native.write([slot], what, self.copies([page], what))
        if self.pool.find_below(self.exact[page])[0].format is not self.pool.native.format:
            self.rounded.add(page)
        self._forget_copies([page])

    def _place_copies(self, pages: Sequence[int]) -> dict[int, tuple[RecordPlane, int]]:
        """Return slots below for copies of those pages that have none (PoolExhaustedError: none was taken)."""
        places: dict[int, tuple[RecordPlane, int]] = {}
        try:
            for plane in self.pool.planes:
                held = [page for page in pages if page not in self.exact]
                mine = [page for page in held if self.pool.find(self.table[page])[0] is plane]
                if mine:
                    places.update(zip(mine, self.pool.place_below(plane.format, len(mine)), strict=True))
        except BaseException:
            self._release(places.values())
            raise
        return places

    def _keep_copies(self, places: Mapping[int, tuple[RecordPlane, int]]) -> None:
        """Copy pages as they are to their slots below."""
        by_planes: dict[tuple[PagePlane, RecordPlane], list[tuple[int, int, int]]] = {}
        for page, (below, slot) in places.items():
            plane, source = self.pool.find(self.table[page])
            by_planes.setdefault((plane, below), []).append((page, source, slot))
        for (plane, below), moves in by_planes.items():
            below.import_from(plane, [source for _, source, _ in moves], [slot for _, _, slot in moves])
            self.exact.update((page, below.handle(slot)) for page, _, slot in moves)

    def _forget_copies(self, pages: Iterable[int]) -> None:
        self._release([self.pool.find_below(self.exact.pop(page)) for page in list(pages)])
