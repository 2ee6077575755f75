"""Keys and values of one context, held in pages of 64 tokens: everything that changes which slot a page lies in.

A page table says where each page lies, in any order. Pages are shared by forks and copied when one of them writes.
A page can be held in less or more detail (`resolving.py`) or dropped, and the context can be cut back to an earlier
length: a question is taken back, its document stays. Where the pool has a smaller format, new tokens are held in the
computing type; pages are written down in the format when the next tokens come, at the earliest, so that what is read
together is read exactly: those of a document at the commit, new ones of a question and its answer between commits. What
was committed in a page that a question goes on in stays exact, so that taking the question back restores every bit.
What a mechanism remembers beside pages (`memory.py`) is cut back, forked, saved and given back with them.

Each change first counts all bytes it takes and gives against the budget, so that one that is refused changes nothing.
It does not know positions (`rotary.py`), mechanisms, or which pages matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from longspan.errors import PoolExhaustedError, UsageError
from longspan.kv import saved
from longspan.kv.base import PAGE
from longspan.kv.blocks import BlockSummaries
from longspan.kv.budget import Budget
from longspan.kv.mirror import Mirror
from longspan.kv.planes import SHIFT, Codes, Plane
from longspan.kv.pool import SUMMARY, PagePool
from longspan.kv.resolving import PageResolver
from longspan.kv.rotary import Rotary
from longspan.kv.tables import DROPPED, SlotTable
from longspan.kv.undisturbed import Undisturbed

__all__ = ["SUMMARY", "PagePool", "PagedKV"]


class PagedKV(PageResolver):
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
        self.exact: dict[int, int] = {}  # page: handle of its exact copy below
        self._written = self._fresh = 0  # pages before: looked at at a commit, and between commits
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

    def census(self) -> Counter[str]:
        """Return how many pages this context holds, by format; those that it shares with forks among them."""
        planes = Counter(handle >> SHIFT for handle in self.table if handle != DROPPED)
        return Counter({self.pool.planes[number].format.name: count for number, count in planes.items()})

    @property
    def nbytes(self) -> int:
        """Bytes that this context refers to, summaries included and exact copies below left out."""
        remembered = 0 if self.memory is None else self.memory.nbytes
        return sum(plane.page_bytes for plane, _ in self._referred()) + remembered

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
        # A committed page may have to come back exactly: until the next commit only pages that are new since then are
        # written down.
        self._fresh = self._write_down(max(self._fresh, -(-self._committed // PAGE)), before)
        self._open(after)
        if self.blocks.kept:
            self._summarise(k, v)
        self._write(k, v, before)
        self._length = after

    def advance(self, count: int) -> None:
        """Hold `count` more tokens, whose keys and values the caller writes to where their pages lie.

        For steps that run as one graph; no summaries are kept, and pages stay in the native type.

        Raises:
            PoolExhaustedError: the pages for them are more than the budget has left; nothing was added.
        """
        assert not self.blocks.kept and self.pool.format is self.pool.native.format, "append() writes these"
        self._open(self._length + count)
        self._length += count

    def _open(self, after: int) -> None:
        """Have pages of this context's own for the tokens up to `after` (PoolExhaustedError: nothing was changed)."""
        pool, before = self.pool, self._length
        page, offset = divmod(before, PAGE)
        first_new, full, end = -(-before // PAGE), after // PAGE, -(-after // PAGE)
        if offset > 0 and full == page and not self._not_writable(page):
            return  # the usual step of decode: the page that is open has room, and is this context's own
        reopened = self._not_writable(page) if offset else []
        takes: dict[Plane, int] = {pool.native: end - first_new}
        takes[pool.marks] = end - first_new if self.blocks.kept else 0
        for plane in reopened:
            takes[plane] += 1
        self._charge(takes, self._replaced(page, reopened))
        self._reopen(page, reopened)
        if self.blocks.kept:
            for mark in pool.marks.take(end - first_new):
                self.blocks.table.append(mark)
        for slot in pool.native.take(end - first_new):
            self.pages.append(slot)

    def append_within(self, k: Tensor, v: Tensor) -> bool:
        """Add one token as `append` does where that changes no page but the last and fills no block of it.

        That is the usual step of decode. It may be interrupted anywhere: what lies behind the last token means nothing.

        Returns:
            Whether it was added; False: nothing was, and `append` is to be called.
        """
        pool, at = self.pool, self._length
        page, offset = divmod(at, PAGE)
        if offset == 0 or k.shape[2] != 1 or (at + 1) % pool.block == 0 or pool.format is not pool.native.format:
            return False
        if k.dtype != pool.dtype or k.device != pool.device or self._not_writable(page):
            return False
        slot = self.table[page]
        pool.keys[:, slot, offset] = k[0, :, 0]
        pool.values[:, slot, offset] = v[0, :, 0]
        if self.rotary is not None and self.mirror.follows(at):
            self.mirror.add(self.rotary.range(k, at))
        self._length = at + 1
        return True

    def replace(
        self, start: int, k: Tensor, v: Tensor, codes: Mapping[str, Codes] | None = None, *, write_down: bool = True
    ) -> None:
        """Hold other tokens from `start` on, where a page begins. All must be committed, and the new ones are.

        Args:
            start: token.
            k: unrotated keys `[1, Hkv, n, D]`.
            v: values `[1, Hkv, n, Dv]`.
            codes: of k and v, where rows were written down already (`gather_codes`): they are not rounded again.
            write_down: as for `commit`.

        Raises:
            PoolExhaustedError: other contexts share the pages, and the budget has no room for these; nothing was
                changed.
        """
        assert start % PAGE == 0 and self._committed == self._length, "only what was committed is replaced"
        pool, first, length = self.pool, start // PAGE, start + k.shape[2]
        old = self._old_enough(first, length) if write_down else range(first, first)
        pages = -(-length // PAGE) - first
        takes: dict[Plane, int] = {pool.plane(pool.format.name): len(old)} if old else {}
        takes |= {pool.native: pages - len(old), pool.marks: pages if self.blocks.kept else 0}
        gone: list[tuple[Plane, int]] = [pool.find(handle) for handle in self.table[first:] if handle != DROPPED]
        gone += [(pool.marks, mark) for mark in self.blocks.table.slots[first:] if mark != DROPPED]
        self._charge(takes, gone, only_try=True)
        self.truncate(start)
        begin, end = (old.start * PAGE - start, old.stop * PAGE - start) if old else (k.shape[2], k.shape[2])
        self.append(k[:, :, :begin], v[:, :, :begin])
        if old:
            known = {what: each.part(begin, end) for what, each in (codes or {}).items()}
            self._add_encoded(k[0, :, begin:end], v[0, :, begin:end], known)
        self.append(k[:, :, end:], v[:, :, end:])
        self.commit(write_down=write_down)

    def commit(self, *, write_down: bool = True) -> None:
        """Say that the tokens so far were read for good.

        Args:
            write_down: whether pages that are old enough are written down in the format now; else a later commit does.
        """
        if write_down:
            self._written = self._write_down(self._written, self._length)
        if self.memory is not None:
            self.memory.commit()
        self._committed = self._length

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self._length:
            raise UsageError(f"a context of {self._length} tokens can't be cut to {length}")
        keep = -(-length // PAGE)
        gone: list[tuple[Plane, int]] = [self.pool.find(handle) for handle in self.table[keep:] if handle != DROPPED]
        gone += [(self.pool.marks, mark) for mark in self.blocks.table.slots[keep:] if mark != DROPPED]
        if length % PAGE:
            self._bring(keep - 1)
        self._let_go(gone)
        self._forget_copies(page for page in self.exact if page >= keep)
        self.pages.cut(keep)
        self.rounded = {page for page in self.rounded if page < keep}
        self._written, self._fresh = min(self._written, length // PAGE), min(self._fresh, length // PAGE)
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
        for page in held:
            self.pages.put(page, DROPPED)
        self._let_go(gone)
        self._forget_copies(page for page in self.exact if first <= page < last)
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
        shared = self._referred_by_plane()
        try:
            other.budget.charge(sum(plane.page_bytes * len(slots) for plane, slots in shared.items()), 0)
        except PoolExhaustedError:
            other.free()
            raise
        for plane, slots in shared.items():
            plane.share(slots)
        for handle in self.exact.values():
            below, slot = self.pool.find_below(handle)
            below.share([slot])
        other.reads_below, other.window = self.reads_below, self.window
        other.pages, other.blocks, other.mirror = self.pages.copy(), self.blocks.fork(), self.mirror.fork()
        other.exact, other.rounded = dict(self.exact), set(self.rounded)
        other._written, other._fresh = self._written, self._fresh
        other._length, other._committed = self._length, self._committed
        return other

    def free(self) -> None:
        """Give every page back; the context is empty and can be used again."""
        self.truncate(0)
        self.mirror.clear()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what is held of the pages, in order, and which they are: what `restore` takes."""
        remembered = {} if self.memory is None else self.memory.tensors(f"{prefix}{saved.MEMORY}")
        return {**saved.pack(self, prefix), **remembered}

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens.

        Raises:
            SessionCorruptError: it does not fit.
            PoolExhaustedError: it is more than the budget has left. In both cases the context is as it was.
        """
        parts = saved.checked(self, prefix, length, tensors)
        self.pool.tiers.require(parts.below_bytes(self.pool))
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
        self._forget_copies(self.exact)
        self.mirror.clear()
        self.pages, self.blocks, self.rounded = SlotTable(), BlockSummaries(self.pool), set()
        # Pages that are old enough by now stay as they were saved.
        self._written, self._fresh = self._old_enough(0, length).stop, 0
        self._length = self._committed = length
        parts.unpack(self)

    def _bring(self, page: int) -> None:
        """Have a page here that is still in a file (SessionError: it can't be read)."""
        if self.table[page] != DROPPED:
            plane, slot = self.pool.find(self.table[page])
            plane.need([slot])

    def moved(self, plane: Plane, moves: dict[int, int]) -> None:
        """See `pool.Movable`."""
        if plane is self.pool.marks:
            self.blocks.table.move(moves)
        elif any(below is plane for below in self.pool.below):
            base = next(below.handle(0) for below in self.pool.below if below is plane)
            self.relocated({base + old: base + new for old, new in moves.items()})
        else:
            base = next(made.handle(0) for made in self.pool.planes if made is plane)
            self.pages.move({base + old: base + new for old, new in moves.items()})

    def relocated(self, handles: dict[int, int]) -> None:
        """See `pool.Movable`."""
        self.exact = {page: handles.get(handle, handle) for page, handle in self.exact.items()}
