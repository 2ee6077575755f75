"""Keys and values of one context, held in pages of 64 tokens: everything that changes which slot a page lies in.

A page table says where each page lies, in any order. Pages are shared by forks and copied when one of them writes.
A page can be written down in a smaller format or left to its summary (`demote`), brought back from an exact copy in
host memory (`promote`), or dropped; and the context can be cut back to an earlier length: a question is taken back,
its document stays. Where full pages are quantised, the page that is not full is held in the computing type, and the
exact page that a question closed is kept until `commit`, so that taking the question back restores every bit.
What a mechanism remembers beside pages (`memory.py`) is cut back, forked, saved and given back with them.

Each change first counts all bytes it takes and gives against the budget, so that one that is refused changes nothing.
It does not know positions (`rotary.py`), mechanisms, or which pages matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from longspan.errors import PoolExhaustedError, UsageError
from longspan.kv import saved
from longspan.kv.base import PAGE
from longspan.kv.blocks import BlockSummaries
from longspan.kv.budget import Budget
from longspan.kv.mirror import Mirror
from longspan.kv.planes import Plane
from longspan.kv.pool import PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.tables import DROPPED, SlotTable
from longspan.kv.undisturbed import Undisturbed
from longspan.kv.writing import PageWriter

__all__ = ["SUMMARY", "PagePool", "PagedKV"]

SUMMARY = "summary"
"""The resolution of a page of which only summaries are left (and perhaps an exact copy in host memory)."""


class PagedKV(PageWriter):
    """One layer's keys and values of one context (B = 1), in pages of a pool."""

    def __init__(self, pool: PagePool, rotary: Rotary | None = None, budget: Budget | None = None) -> None:
        """Start an empty context.

        Args:
            pool: where its pages lie.
            rotary: how the model encodes positions; None: it does not.
            budget: this session's bytes, with the pool's budget at its root; None: the pool's budget alone.

        Raises:
            UsageError: a budget below one page.
        """
        self.pool, self.rotary = pool, rotary
        self.budget = pool.budget if budget is None else budget
        assert self.budget.root is pool.budget.root, "a session's budget is a part of its pool's"
        self.budget.require(pool.least_bytes, "one page of a layer")
        self.pages, self.blocks, self.mirror = SlotTable(), BlockSummaries(pool), Mirror()
        self.exact: dict[int, int] = {}  # page: slot of its exact copy in host memory
        self.raw: dict[int, int] = {}  # page: native slot of what was quantised since the last commit
        self.rounded: set[int] = set()  # pages of the native type whose first tokens went through a smaller format
        self._length = self._committed = 0
        pool.join(self)

    def __del__(self) -> None:
        """Give every page back: whoever forgets a context need not know that a budget counted it."""
        with suppress(Exception), Undisturbed():  # made only in part, or at the end of the program
            self.free()

    @property
    def pages_held(self) -> int:
        """Number of pages that can be read."""
        return sum(handle != DROPPED for handle in self.table)

    @property
    def nbytes(self) -> int:
        """Bytes that this context refers to, summaries included and exact copies in host memory left out."""
        remembered = 0 if self.memory is None else self.memory.nbytes
        return sum(plane.page_bytes for plane, _ in self._referred()) + remembered

    def resolution(self, page: int) -> str:
        """Return the format that a page is held in, or `summary` (of which nothing may be kept, if it was dropped)."""
        handle = self.table[page]
        return SUMMARY if handle == DROPPED else self.pool.find(handle)[0].format.name

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the unrotated keys `[1, Hkv, T, D]` and values `[1, Hkv, T, Dv]` of the next T tokens.

        Raises:
            PoolExhaustedError: the pages for them are more than the budget has left; nothing was added.
        """
        pool = self.pool
        k, v = k[0].to(pool.device, pool.dtype), v[0].to(pool.device, pool.dtype)
        before, after = self._length, self._length + k.shape[1]
        if before == after:
            return
        page, offset = divmod(before, PAGE)
        first_new, full, end = -(-before // PAGE), after // PAGE, -(-after // PAGE)
        if offset > 0 and full == page and not self._not_writable(page):
            # The usual step of decode: the page that is open has room, and is this context's own.
            if self.blocks.kept:
                self._summarise(k, v)
            self._write(k, v, before)
            self._length = after
            return
        quantised = pool.format is not pool.native.format
        closes = quantised and offset > 0 and full > page
        whole = max(0, full - first_new) if quantised else 0  # pages that fill at once are encoded at once
        # The exact page that was open at the last commit is kept, and the newest one beside it.
        stale = [old for old in self.raw if closes and old != self._committed // PAGE]
        reopened = self._not_writable(page) if offset else []
        takes = {pool.native: end - first_new - whole, pool.marks: end - first_new if self.blocks.kept else 0}
        for plane in reopened:
            takes[plane] += 1
        if quantised:
            takes[pool.plane(pool.format.name)] = whole + closes
        self._charge(takes, [*self._replaced(page, reopened), *((pool.native, self.raw[old]) for old in stale)])

        self._reopen(page, reopened)
        if self.blocks.kept:
            for mark in pool.marks.take(end - first_new):
                self.blocks.table.append(mark)
            self._summarise(k, v)
        done = 0
        if closes:
            done = PAGE - offset
            self._write(k[:, :done], v[:, :done], before)
            pool.native.release(self.raw.pop(old) for old in stale)
            self._close(page)
        if whole:
            self._add_encoded(k[:, done : done + whole * PAGE], v[:, done : done + whole * PAGE], whole)
            done += whole * PAGE
        for slot in pool.native.take(end - len(self.table)):
            self.pages.append(slot)
        self._write(k[:, done:], v[:, done:], before + done)
        self._length = after

    def commit(self) -> None:
        """Say that the tokens so far were read for good: exact copies of pages that were quantised are given up."""
        if self.raw:
            slots = list(self.raw.values())
            self._charge({}, ((self.pool.native, slot) for slot in slots))
            self.pool.native.release(slots)
            self.raw = {}
        if self.memory is not None:
            self.memory.commit()
        self._committed = self._length

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self._length:
            raise UsageError(f"a context of {self._length} tokens can't be cut to {length}")
        keep, half = -(-length // PAGE), length // PAGE if length % PAGE else -1
        gone: list[tuple[Plane, int]] = [self.pool.find(handle) for handle in self.table[keep:] if handle != DROPPED]
        gone += [(self.pool.marks, mark) for mark in self.blocks.table.slots[keep:] if mark != DROPPED]
        gone += [(self.pool.native, self.raw.pop(page)) for page in list(self.raw) if page >= keep]
        if half in self.raw:
            # The page that is no longer full comes back as it was before it was quantised.
            if self.table[half] != DROPPED:
                gone.append(self.pool.find(self.table[half]))
            self.pages.put(half, self.raw.pop(half))
        self._let_go(gone)
        for page in [page for page in self.exact if page >= keep]:
            self.pool.host.release([self.exact.pop(page)])
        self.pages.cut(keep)
        self.rounded = {page for page in self.rounded if page < keep}
        self.blocks.truncate(length)
        self.mirror.truncate(length)
        if self.memory is not None:
            self.memory.truncate(length)
        self._length, self._committed = length, min(length, self._committed)

    def drop(self, start: int, stop: int) -> None:
        """Drop every page that lies wholly within the tokens `start .. stop - 1`; summaries that are kept stay."""
        first, last = -(-start // PAGE), min(stop, self._length) // PAGE
        held = [page for page in range(first, last) if self.table[page] != DROPPED]
        gone = [self.pool.find(self.table[page]) for page in held]
        gone += [(self.pool.native, self.raw.pop(page)) for page in held if page in self.raw]
        for page in held:
            self.pages.put(page, DROPPED)
        self._let_go(gone)
        for page in [page for page in self.exact if first <= page < last]:
            self.pool.host.release([self.exact.pop(page)])
        if held:
            self.mirror.clear()

    def fork(self, budget: Budget | None = None) -> PagedKV:
        """Return a context with the same tokens that shares every page until one of the two writes to it.

        Args:
            budget: the fork's own; None: this context's, which then counts what the two share twice (its root once).

        Raises:
            PoolExhaustedError: the fork's budget is too small for what it would refer to.
        """
        other = PagedKV(self.pool, self.rotary, self.budget if budget is None else budget)
        other.memory = None if self.memory is None else self.memory.fork(other.budget)
        shared = list(self._referred())
        try:
            other.budget.charge(sum(plane.page_bytes for plane, _ in shared), 0)
        except PoolExhaustedError:
            other.free()
            raise
        for plane, slot in shared:
            plane.share([slot])
        self.pool.host.share(self.exact.values())
        other.pages, other.blocks, other.mirror = SlotTable(self.table), self.blocks.fork(), self.mirror.fork()
        other.exact, other.raw, other.rounded = dict(self.exact), dict(self.raw), set(self.rounded)
        other._length, other._committed = self._length, self._committed
        return other

    def free(self) -> None:
        """Give every page back; the context is empty and can be used again."""
        self.truncate(0)
        self.mirror.clear()

    def demote(self, pages: Sequence[int], to: str, *, keep_exact: bool = False) -> None:
        """Write full pages down in a smaller format, or leave them to their summaries.

        Pages must have been committed: those of a question may still have to come back exactly. A page that is held in
        as small a format already stays as it is.

        Args:
            pages: numbers of pages; each once.
            to: a format's name, or `summary`.
            keep_exact: whether an exact copy (of pages that are exact) stays in host memory, for `promote`.

        Raises:
            UnknownNameError, UsageError: no such format, or none for this float type.
            PoolExhaustedError: other contexts share the pages, and the budget has no room for the smaller ones beside.
        """
        assert all(0 <= page < self._committed // PAGE for page in pages), "only pages that were committed are demoted"
        plane = None if to == SUMMARY else self.pool.plane(to)
        bits = 0 if plane is None else plane.format.bits
        held = [page for page in pages if self.table[page] != DROPPED]
        held = [page for page in held if self.pool.find(self.table[page])[0].format.bits > bits]
        if not held:
            return
        assert plane is not None or self.blocks.kept, "the pool keeps no summary that could stand for a page"
        gone = [self.pool.find(self.table[page]) for page in held]
        self._charge({} if plane is None else {plane: len(held)}, gone)
        for page, (old, slot) in zip(held, gone, strict=True):
            if keep_exact and old is self.pool.native:
                (self.exact[page],) = self.pool.host.take()
                self._copy(old, slot, self.pool.host, self.exact[page])
            elif not keep_exact and page in self.exact:
                self.pool.host.release([self.exact.pop(page)])
        if plane is not None:
            which = torch.tensor(held)
            numbers = {what: self.whole_pages(which, what) for what in ("k", "v")}
            slots = plane.take(len(held))
            for what, rows in numbers.items():
                plane.write(slots, what, rows)
        for i, page in enumerate(held):
            self.pages.put(page, DROPPED if plane is None else plane.handle(slots[i]))
        self._release(gone)
        self.mirror.clear()

    def promote(self, pages: Sequence[int]) -> None:
        """Bring pages back from their exact copies in host memory (PoolExhaustedError: none was brought back)."""
        assert all(page in self.exact for page in pages), "no exact copy of the page was kept"
        gone = [self.pool.find(self.table[page]) for page in pages if self.table[page] != DROPPED]
        self._charge({self.pool.native: len(pages)}, gone)
        for page, slot in zip(pages, self.pool.native.take(len(pages)), strict=True):
            self._from_host(page, slot)
            self.pages.put(page, slot)
        self._release(gone)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what is held of the pages, in order, and which they are: what `restore` takes."""
        remembered = {} if self.memory is None else self.memory.tensors(f"{prefix}{saved.MEMORY}")
        return {**saved.pack(self, prefix), **remembered}

    def restore(self, prefix: str, length: int, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens.

        Raises:
            SessionCorruptError: it does not fit.
            PoolExhaustedError: it is more than the budget has left. In both cases the context is as it was.
        """
        parts = saved.checked(self, prefix, length, tensors)
        memory = saved.remembered(self, prefix, length, tensors, parts)
        try:
            self._charge(parts.takes(self.pool), self._referred())
        except PoolExhaustedError:
            if memory is not None:
                memory.truncate(0)
            raise
        if self.memory is not None:
            self.memory.truncate(0)
            self.memory = memory
        self._release(self._referred())
        self.pool.host.release(self.exact.values())
        self.mirror.clear()
        self.pages, self.blocks, self.exact, self.raw = SlotTable(), BlockSummaries(self.pool), {}, {}
        self.rounded = set()
        self._length = self._committed = length
        parts.unpack(self)

    def moved(self, plane: Plane, moves: dict[int, int]) -> None:
        """See `pool.Movable`."""
        if plane is self.pool.marks:
            self.blocks.table.move(moves)
        elif plane is self.pool.host:
            self.exact = {page: moves.get(slot, slot) for page, slot in self.exact.items()}
        else:
            base = next(made.handle(0) for made in self.pool.planes if made is plane)
            self.pages.move({base + old: base + new for old, new in moves.items()})
            if plane is self.pool.native:
                self.raw = {page: moves.get(slot, slot) for page, slot in self.raw.items()}
