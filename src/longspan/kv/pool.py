"""The memory of one layer: planes by format, summaries, and exact copies in the tiers below (`tiers.py`).

Pages of any number of contexts lie in a pool, shared by reference count. A page table entry is a handle, plane and slot
in one number; the native plane (the type that keys are computed in) has number 0, so that its handles are slots.
The pool does not know which page of which context a slot holds, nor who pays for it: `pages.py` does.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.kv import formats
from longspan.kv.base import BLOCK, PAGE, SUMMARIES
from longspan.kv.budget import Budget
from longspan.kv.encodings import Format
from longspan.kv.planes import SHIFT, SLOT, PagePlane, Plane
from longspan.kv.records import RecordPlane
from longspan.kv.tiers import DISK, HOST, Tiers

SUMMARY = "summary"
"""The resolution of a page of which only summaries are left (and perhaps a copy below)."""
_MOVED = 16
"""Copies that move from host memory to disk together at least, where there is room."""


@dataclass(frozen=True)
class Resolution:
    """What a page can be held as."""

    name: str
    bits: int
    nbytes: int
    """Bytes of a page, beside its summary."""
    error: float
    """Typical error of what it gives back (`Format.error`); 1: nothing but means."""


class Movable(Protocol):
    """Who refers to slots and must hear when they move."""

    def moved(self, plane: Plane, moves: dict[int, int]) -> None:
        """Follow the slots of a plane that were moved, from old to new."""

    def relocated(self, handles: dict[int, int]) -> None:
        """Follow copies below the device that were moved, from old handle to new."""


class PagePool:
    """Slots for the pages of one layer, of every context that shares this pool."""

    def __init__(
        self,
        kv_heads: int,
        dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        budget: Budget | None = None,
        *,
        kv_format: str | None = None,
        summaries: Sequence[str] = (),
        block: int = PAGE,
        tiers: Tiers | None = None,
    ) -> None:
        """Start without any slot.

        Args:
            kv_heads: KV heads of the layer.
            dim: size of a key.
            value_dim: size of a value.
            dtype: the float type that keys and values come in; a page that is not full is held in it.
            device: where pages lie.
            budget: bytes that all contexts of this pool (and of others with the same budget) may take together.
            kv_format: format of full pages (`formats.parse`); None: the float type itself.
            summaries: which of `kv.base.SUMMARIES` are kept up to date for every page.
            block: tokens that one summary stands for, a divisor of `PAGE` and a multiple of `BLOCK`.
            tiers: where copies of pages lie; None: in host memory, as much as it takes.

        Raises:
            UnknownNameError: no such format.
            UsageError: a format that is not narrower than the type, or a budget below one page.
        """
        assert PAGE % block == 0 and block % BLOCK == 0, f"a page is not made of blocks of {block}"
        assert set(summaries) <= set(SUMMARIES), f"unknown summaries {summaries}"
        self.kv_heads, self.dims, self.dtype, self.device = kv_heads, {"k": dim, "v": value_dim}, dtype, device
        self.budget = Budget() if budget is None else budget
        self.summaries, self.block = tuple(summaries), block
        self.format = formats.format_of(kv_format, dtype)
        self._planes: list[PagePlane] = []
        self._contexts: weakref.WeakSet[Movable] = weakref.WeakSet()
        self.native = self.plane(formats.format_for(dtype).name)
        root = self.budget.root
        per_page = PAGE // block
        self.marks = Plane(
            {what: ((per_page, value_dim if what == "mean_value" else dim), dtype) for what in self.summaries},
            kv_heads,
            device,
            root,
        )
        self.tiers = tiers or Tiers()
        self._below: list[RecordPlane] = []
        self._ladders: dict[tuple[str, ...], list[Resolution]] = {}
        self.budget.require(self.least_bytes, "one page of a layer")

    @property
    def least_bytes(self) -> int:
        """Bytes without which not even one token can be kept: one page that is not full yet, and its summaries."""
        return self.native.page_bytes + self.marks.page_bytes

    @property
    def keys(self) -> Tensor:
        """The native plane's keys `[Hkv, slots, PAGE, D]`."""
        return self.native.tensors["k"]

    @property
    def values(self) -> Tensor:
        """The native plane's values `[Hkv, slots, PAGE, Dv]`."""
        return self.native.tensors["v"]

    @property
    def slots(self) -> int:
        """Number of slots for pages, used and free, in all formats."""
        return sum(plane.slots for plane in self._planes)

    @property
    def free(self) -> int:
        """Number of slots that hold no page."""
        return sum(len(plane.free_slots) for plane in self._planes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that is set aside on the device, free slots included."""
        return sum(plane.nbytes for plane in self._planes) + self.marks.nbytes

    @property
    def planes(self) -> Sequence[PagePlane]:
        """The planes so far, by number."""
        return self._planes

    @property
    def _free(self) -> list[int]:
        return self.native.free_slots

    @_free.setter
    def _free(self, slots: list[int]) -> None:
        self.native.free_slots = slots

    def ladder(self, formats: Sequence[str]) -> list[Resolution]:
        """Return what pages can be held as, in ever more bits: the summary, formats, the pool's format, its own type.

        Args:
            formats: those between the summary and the pool's format; what is not smaller than it is left out.
        """
        known = self._ladders.get(tuple(formats))
        if known is None:
            planes = {self.plane(name).format.bits: self.plane(name) for name in formats}
            planes = {bits: plane for bits, plane in planes.items() if bits < self.format.bits}
            for plane in (self.plane(self.format.name), self.native):
                planes[plane.format.bits] = plane
            found = [
                Resolution(p.format.name, bits, p.page_bytes, p.format.error) for bits, p in sorted(planes.items())
            ]
            # With very small heads, scales may take more than a smaller format saves.
            held = [low for i, low in enumerate(found) if all(low.nbytes < high.nbytes for high in found[i + 1 :])]
            known = self._ladders[tuple(formats)] = [Resolution(SUMMARY, 0, 0, 1.0), *held]
        return known

    def empty(self) -> PagePool:
        """Return a pool of the same kind without any slot or budget."""
        dim, value_dim = self.dims["k"], self.dims["v"]
        made, kinds = self.format.describe(), self.summaries
        return PagePool(
            self.kv_heads, dim, value_dim, self.dtype, self.device, kv_format=made, summaries=kinds, block=self.block
        )

    @property
    def below(self) -> Sequence[RecordPlane]:
        """The planes of copies below the device, by number, in whichever tier."""
        return self._below

    def census(self) -> dict[tuple[str, str], int]:
        """Return how many pages are held, by tier (`device`, `host`, `disk`) and format."""
        found = {("device", plane.format.name): plane.slots - len(plane.free_slots) for plane in self._planes}
        for below in self._below:
            place = below.tier, below.format.name
            found[place] = found.get(place, 0) + below.slots - len(below.free_slots)
        return {place: count for place, count in found.items() if count}

    def plane(self, spec: str) -> PagePlane:
        """Return the plane of a format, made on first use (UnknownNameError, UsageError: see `formats.format_of`).

        A name without options is the pool's own format of that name, if it has one.
        """
        return self.plane_of(self._format(spec))

    def plane_of(self, made: Format) -> PagePlane:
        """Return the plane of a format, made on first use."""
        for plane in self._planes:
            if plane.format.coding == made.coding:
                return plane
        self._planes.append(PagePlane(len(self._planes), made, self.kv_heads, self.dims, self.device, self.budget.root))
        return self._planes[-1]

    def plane_below(self, made: Format, tier: str) -> RecordPlane:
        """Return the plane of copies that are held in a format and a tier, made on first use."""
        for plane in self._below:
            if plane.format.coding == made.coding and plane.tier == tier:
                return plane
        number = len(self._below)
        self._below.append(RecordPlane(number, made, self.kv_heads, self.dims, self.device, self.tiers, tier))
        return self._below[-1]

    def place_below(self, made: Format, count: int) -> list[tuple[RecordPlane, int]]:
        """Take slots for copies of pages in a format: in host memory, from which the oldest move to disk for them.

        Raises:
            PoolExhaustedError: the tiers have no room for so many; none was taken.
        """
        host = self.plane_below(made, HOST)
        left = self.tiers.left(HOST)
        lacking = 0 if left is None else max(0, count - left // host.page_bytes)
        if lacking:
            self.tiers.require(count * host.page_bytes)
            # What was used last stays near; moved by the dozen, since every context must hear of it.
            moved = host.oldest(max(lacking, min(_MOVED, (self.tiers.left(DISK) or 0) // host.page_bytes)))
            if moved:
                self._relocate(host.hand_over(self.plane_below(made, DISK), moved))
            left = self.tiers.left(HOST)
            lacking = 0 if left is None else max(0, count - left // host.page_bytes)
        slots = [(host, slot) for slot in host.take(count - lacking)]
        if lacking:
            disk = self.plane_below(made, DISK)
            try:
                slots += [(disk, slot) for slot in disk.take(lacking)]
            except BaseException:
                host.release([slot for _, slot in slots])
                raise
        return slots

    def want(self) -> None:
        """Say that every page will be read soon: those that are still in a file come at once."""
        for plane in self._planes:
            if (coming := plane.coming) is not None:
                coming.wanted = {"k", "v"}

    def page_bytes(self, spec: str) -> int:
        """Return the bytes of one page of keys and values in a format, scales included (errors: as `plane`)."""
        made = self._format(spec)
        return sum(made.page_bytes(what, self.kv_heads, dim) for what, dim in self.dims.items())

    def find(self, handle: int) -> tuple[PagePlane, int]:
        """Return the plane and the slot of a handle."""
        return self._planes[handle >> SHIFT], handle & SLOT

    def find_below(self, handle: int) -> tuple[RecordPlane, int]:
        """Return the plane and the slot of the handle of a copy below the device."""
        return self._below[handle >> SHIFT], handle & SLOT

    def by_plane_below(self, handles: Sequence[int]) -> dict[RecordPlane, list[int]]:
        """Return which of these handles, by their place in the list, lie in each plane below the device."""
        found: dict[RecordPlane, list[int]] = {}
        for i, handle in enumerate(handles):
            found.setdefault(self._below[handle >> SHIFT], []).append(i)
        return found

    def _format(self, spec: str) -> Format:
        return self.format if spec == self.format.name else formats.format_of(spec, self.dtype)

    def reserve(self, slots: int) -> None:
        """Make room for at least this many pages of the native type."""
        self.native.reserve(slots)

    def join(self, context: Movable) -> None:
        """Tell a context from now on when slots move."""
        self._contexts.add(context)

    def compact(self) -> None:
        """Give the memory of free slots back, by moving pages to the front of their planes.

        A budget counts pages; the memory they leave behind when they are demoted is only freed here.
        """
        for plane in (*self._planes, self.marks, *self._below):
            if plane.free_slots:
                moves = plane.compact()
                for context in list(self._contexts):
                    context.moved(plane, moves)

    def _relocate(self, handles: dict[int, int]) -> None:
        """Tell every context of copies that lie elsewhere now, by their handles."""
        for context in list(self._contexts):
            context.relocated(handles)
