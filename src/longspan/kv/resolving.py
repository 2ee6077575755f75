"""One context's pages in less or more detail: a smaller format, their summaries alone, or brought back.

A page that is demoted may leave a copy of what it was held as below, which no budget counts; from there it can
be promoted again, and written down in any smaller format without rounding twice. It does not know which pages matter:
`attention/rebalance.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.errors import PoolExhaustedError
from longspan.kv.base import PAGE
from longspan.kv.planes import SHIFT, PagePlane, Plane
from longspan.kv.pool import SUMMARY, Resolution
from longspan.kv.records import RecordPlane
from longspan.kv.tables import DROPPED
from longspan.kv.writing import PageWriter


class PageResolver(PageWriter):
    """What moves pages between resolutions."""

    def ladder(self, formats: Sequence[str]) -> list[Resolution]:
        """See `PagePool.ladder`."""
        return self.pool.ladder(formats)

    def levels(self, ladder: Sequence[Resolution]) -> tuple[Tensor, Tensor]:
        """Return where on a ladder each page is held, and where its copy below is, int64 `[pages]` each.

        A page without a copy, or of which nothing but a copy of less is there, can't be brought higher than it is held.
        """

        def level(plane: PagePlane) -> int:
            """Return the highest level of no more bits."""
            return max(i for i, resolution in enumerate(ladder) if resolution.bits <= plane.format.bits)

        by_plane = torch.tensor([level(plane) for plane in self.pool.planes])
        by_below = [level(plane) for plane in self.pool.below]
        handles = self.pages.tensor(self.pool.device).cpu()
        held = torch.where(handles == DROPPED, 0, by_plane[(handles >> SHIFT).clamp(min=0)])
        best = held.clone()
        if self.exact:
            copied = torch.tensor(list(self.exact))
            best[copied] = torch.tensor([by_below[handle >> SHIFT] for handle in self.exact.values()])
        return held, torch.maximum(held, best)

    def resolution(self, page: int) -> str:
        """Return the format that a page is held in, or `summary` (of which nothing may be kept, if it was dropped)."""
        handle = self.table[page]
        return SUMMARY if handle == DROPPED else self.pool.find(handle)[0].format.name

    def demote(self, pages: Sequence[int], to: str, *, keep_exact: bool = False) -> None:
        """Write full pages down in a smaller format, or leave them to their summaries.

        Pages must have been committed: those of a question may still have to come back exactly. A page that is held in
        as small a format already stays as it is.

        Args:
            pages: numbers of pages; each once.
            to: a format (`pool.plane`), or `summary`.
            keep_exact: whether a copy stays below, for `promote`: one of what is held now, or the one that is
                there already.

        Raises:
            UnknownNameError, UsageError: no such format, or none for this float type.
            PoolExhaustedError: other contexts share the pages, and the budget has no room for the smaller ones beside;
                or the tiers have none for copies. Nothing was changed.
        """
        assert all(0 <= page < self._committed // PAGE for page in pages), "only pages that were committed are demoted"
        plane = None if to == SUMMARY else self.pool.plane(to)
        bits = 0 if plane is None else plane.format.bits
        held = [page for page in pages if self.table[page] != DROPPED]
        held = [page for page in held if self.pool.find(self.table[page])[0].format.bits > bits]
        if not held:
            return
        stands = self.blocks.kept or (keep_exact and self.reads_below)
        assert plane is not None or stands, "the pool keeps no summary that could stand for a page"
        gone = [self.pool.find(self.table[page]) for page in held]
        places = self._place_copies(held) if keep_exact else {}
        try:
            self._charge({} if plane is None else {plane: len(held)}, gone)
        except PoolExhaustedError:
            self._release(places.values())
            raise
        self._keep_copies(places)
        if plane is None:
            for page in held:
                self.pages.put(page, DROPPED)
            self.mirror.clear()
        else:
            self._recode(held, plane, {what: self._best(held, what) for what in ("k", "v")})
        if not keep_exact:
            self._forget_copies([page for page in held if page in self.exact])
        self._release(gone)

    def promote(self, pages: Sequence[int], to: str | None = None) -> None:
        """Bring pages back from their copies below.

        Args:
            pages: numbers of pages; each once.
            to: a format in more detail than they are held in, and in less than their copies, which then stay; None:
                what the copies are, which are given up.

        Raises:
            PoolExhaustedError: none was brought back.
        """
        assert all(page in self.exact for page in pages), "no exact copy of the page was kept"
        gone = [self.pool.find(self.table[page]) for page in pages if self.table[page] != DROPPED]
        copies = [self.pool.find_below(self.exact[page]) for page in pages]
        planes = [self.pool.plane_of(below.format) if to is None else self.pool.plane(to) for below, _ in copies]
        takes: dict[Plane, int] = {}
        for plane in planes:
            takes[plane] = takes.get(plane, 0) + 1
        self._charge(takes, gone)
        by_planes: dict[tuple[PagePlane, RecordPlane], list[int]] = {}
        for i, (plane, (below, _)) in enumerate(zip(planes, copies, strict=True)):
            by_planes.setdefault((plane, below), []).append(i)
        for (plane, below), mine in by_planes.items():
            chosen = [pages[i] for i in mine]
            if to is not None:
                self._recode(chosen, plane, {what: self.copies(chosen, what) for what in ("k", "v")})
                continue
            slots = plane.take(len(mine))
            below.export_to(plane, [copies[i][1] for i in mine], slots)
            for page, slot in zip(chosen, slots, strict=True):
                self.pages.put(page, plane.handle(slot))
            self._forget_copies(chosen)
        self._release(gone)

    def _best(self, pages: Sequence[int], what: str) -> Tensor:
        """Return `k` or `v` of pages `[Hkv, n, PAGE, D]`, from their copies below where they have one."""
        numbers = self.whole_pages(torch.tensor(pages), what)
        copied = [i for i, page in enumerate(pages) if page in self.exact]
        if copied:
            numbers[:, copied] = self.copies([pages[i] for i in copied], what)
        return numbers
