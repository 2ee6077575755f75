"""Writing tokens into one context's pages: slots of its own, quantising what fills, summaries, bytes.

The steps that `pages.py` composes. None of them can fail for want of bytes: `_charge` is called first, with all the
slots that a change takes and gives back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longspan.kv.base import PAGE
from longspan.kv.planes import Plane
from longspan.kv.reading import PageReader
from longspan.kv.tables import DROPPED, NATIVE

Slots = Iterable[tuple[Plane, int]]


class PageWriter(PageReader):
    """What of a context changes with every token."""

    raw: dict[int, int]
    """Pages that were quantised since the last commit, and the native slot that still holds them exactly."""

    rounded: set[int]
    """Pages of the native type whose first tokens went through a smaller format: their summaries are more exact."""

    def _referred(self) -> Iterable[tuple[Plane, int]]:
        """Every slot that this context refers to and pays for."""
        yield from (self.pool.find(handle) for handle in self.table if handle != DROPPED)
        yield from ((self.pool.marks, mark) for mark in self.blocks.table.slots if mark != DROPPED)
        yield from ((self.pool.native, slot) for slot in self.raw.values())

    def _charge(self, takes: dict[Plane, int], gives: Slots) -> None:
        """Count slots that will be taken and given back, before anything is changed (PoolExhaustedError)."""
        referred = memory = sum(plane.page_bytes * count for plane, count in takes.items())
        for plane, slot in gives:
            referred -= plane.page_bytes
            if plane.references[slot] == 1:
                memory -= plane.page_bytes
        if referred or memory:
            self.budget.charge(referred, memory)

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
                self._from_host(page, slot)
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

    def _close(self, page: int) -> None:
        """Quantise a page that just filled; the exact one is kept for `truncate`."""
        target = self.pool.plane(self.pool.format.name)
        (slot,) = target.take()
        self.raw[page] = self.table[page]
        for what in ("k", "v"):
            target.write([slot], what, self.pool.native.tensors[what][:, [self.table[page]]])
        self.pages.put(page, target.handle(slot))

    def _add_encoded(self, k: Tensor, v: Tensor, pages: int) -> None:
        """Add whole pages, k `[Hkv, pages * PAGE, D]`, in the pool's format."""
        target = self.pool.plane(self.pool.format.name)
        slots = target.take(pages)
        for what, rows in (("k", k), ("v", v)):
            target.write(slots, what, rows.unflatten(1, (pages, PAGE)))
        for slot in slots:
            self.pages.append(target.handle(slot))

    def _summarise(self, k: Tensor, v: Tensor) -> None:
        """Write the summaries of the blocks that k `[Hkv, n, D]` and v fill, which are not in their pages yet."""
        before, block = self._length, self.pool.block
        start = before // block * block
        if (before + k.shape[1]) // block == before // block:
            return
        if start < before:
            slot, begun = self.table[before // PAGE], slice(start % PAGE, before % PAGE)
            k = torch.cat([self.pool.keys[:, slot, begun], k], 1)
            v = torch.cat([self.pool.values[:, slot, begun], v], 1)
        self.blocks.write(self, start, k, v)

    def _from_host(self, page: int, slot: int) -> None:
        """Copy a page's exact copy into a native slot, and give the copy up."""
        self._copy(self.pool.host, self.exact[page], self.pool.native, slot)
        self.pool.host.release([self.exact.pop(page)])

    @staticmethod
    def _copy(source: Plane, from_slot: int, target: Plane, to_slot: int) -> None:
        for name, tensor in target.tensors.items():
            tensor[:, to_slot] = source.tensors[name][:, from_slot].to(tensor.device)
