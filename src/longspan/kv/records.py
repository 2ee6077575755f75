"""Copies of pages below the device: each slot is one record of bytes, in host memory or in a file.

A record holds a page's keys, their scales, values and theirs, one after the other, so that a page is one stretch of
memory to copy. It looks like any other plane of pages (`planes.py`) to whoever reads or writes numbers, and counts its
bytes in its tier's budget as slots are taken and given back. It does not know which pages of which context lie in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from longspan.kv.encodings import Format
from longspan.kv.planes import PagePlane
from longspan.kv.tiers import DISK, Tiers

_ALIGNED = 64
"""Bytes that each part of a record begins at a multiple of."""


class RecordPlane(PagePlane):
    """Records of pages in one format, in one tier."""

    def __init__(
        self,
        number: int,
        made: Format,
        heads: int,
        dims: Mapping[str, int],
        device: torch.device,
        tiers: Tiers,
        tier: str,
    ) -> None:
        """Start without any slot; `device` is that of the pages whose copies these are."""
        self.tiers, self.tier, self.to = tiers, tier, device
        self._lock = threading.Lock()  # a file must not shrink while the prefetching thread reads it
        self._storage = tiers.storage(tier, device)
        self._base: Tensor | None = None
        self._down: torch.cuda.Event | None = None  # after which all copies from a GPU are here
        self._clock = 0
        self._touched: list[int] = []  # when each slot was last written or read
        super().__init__(number, made, heads, dims, torch.device("cpu"), tiers.budgets[tier])
        self._parts: dict[str, tuple[int, int]] = {}  # where each tensor begins and ends in a record
        end = 0
        for name, tensor in self.tensors.items():
            count = heads * tensor[0].new_empty(tensor.shape[2:]).nbytes if tensor.shape[-1] else 0
            self._parts[name] = (end, end + count)
            end += -(-count // _ALIGNED) * _ALIGNED
        self._record = self.page_bytes = end

    @property
    def nbytes(self) -> int:
        """See `Plane.nbytes`."""
        return 0 if self._base is None else self._base.nbytes

    def take(self, count: int = 1) -> list[int]:
        """See `Plane.take` (PoolExhaustedError: the tier or its disk has no room; nothing was taken)."""
        self._budget.charge(0, count * self.page_bytes)
        try:
            taken = super().take(count)
        except BaseException:
            self._budget.charge(0, -count * self.page_bytes)
            raise
        self._touch(taken)
        return taken

    def release(self, slots: Iterable[int]) -> None:
        """See `Plane.release`."""
        before = len(self.free_slots)
        slots = list(slots)
        super().release(slots)
        self.tiers.prefetcher.forget(self, [slot for slot in slots if not self.references[slot]])
        self._budget.charge(0, -(len(self.free_slots) - before) * self.page_bytes)

    def compact(self) -> dict[int, int]:
        """See `Plane.compact`."""
        self._settle()
        self.tiers.prefetcher.forget(self, range(self.slots))
        moved = super().compact()
        for old, new in moved.items():
            self._touched[new] = self._touched[old]
        del self._touched[self.slots :]
        return moved

    def import_from(self, other: PagePlane, sources: list[int], targets: list[int]) -> None:
        """See `PagePlane.import_from`; counted as bytes that went down."""
        self.tiers.traffic.down(self.tier, len(targets) * self.page_bytes)
        other.need(sources)
        if isinstance(other, RecordPlane):
            assert self._base is not None, "the targets were taken"
            self._base[targets] = other.records(sources)
            return
        if not self.on_gpu:
            super().import_from(other, sources, targets)
            return
        records = torch.empty(len(sources), self._record, dtype=torch.uint8, device=self.to)
        for name, view in self._views(records).items():
            view.copy_(other.tensors[name][:, sources])
        assert self._base is not None, "the targets were taken"
        for record, target in zip(records, targets, strict=True):
            self._base[target].copy_(record, non_blocking=self.tier != DISK)  # only host memory is pinned
        self._down = torch.cuda.Event()
        self._down.record()

    def export_to(self, other: PagePlane, sources: list[int], targets: list[int]) -> None:
        """Copy pages as they are to a plane of the same format on the device."""
        assert other.format.coding == self.format.coding, "only pages of one format are copied as they are"
        for name, view in self._views(self.fetch(sources, 0, self._record)).items():
            other.tensors[name][:, targets] = view

    def pages(self, slots: list[int], what: str, dtype: torch.dtype) -> Tensor:
        """Return `k` or `v` of pages `[Hkv, n, PAGE, D]` on the device; what was prefetched is not read again."""
        start, stop = (0, self._parts["v"][0]) if what == "k" else (self._parts["v"][0], self._record)
        views = self._views(self.fetch(slots, start, stop), start, what)
        if self.format.code_dtype == dtype:
            return views[what]
        return self.format.decode(views[what], views[f"{what}_scale"], what, self.dims[what], dtype)

    def fetch(self, slots: list[int], start: int, stop: int) -> Tensor:
        """Return the bytes `start .. stop - 1` of records `[n, bytes]` on the device, and count them as read."""
        self._touch(slots)
        # A page's values are asked for after its keys: it is one page that was read.
        staged = self.tiers.prefetcher.take(self, slots, counted=not start) if self.prefetches else {}
        missing = [slot for slot in slots if slot not in staged]
        if not staged:
            return self._load(missing, start, stop)
        out = torch.empty(len(slots), stop - start, dtype=torch.uint8, device=self.to)
        if missing:
            at = torch.tensor([i for i, slot in enumerate(slots) if slot not in staged], device=self.to)
            out[at] = self._load(missing, start, stop)
        for i, slot in enumerate(slots):
            if slot in staged:
                out[i] = staged[slot][start:stop]
        return out

    def load(self, slots: Sequence[int]) -> Tensor:
        """See `prefetch.Source`."""
        return self._load(list(slots), 0, self._record)

    def _load(self, slots: list[int], start: int, stop: int) -> Tensor:
        """Return bytes of records on the device, from where they lie."""
        records = self.records(slots, start, stop)
        self.tiers.traffic.up(self.tier, records.nbytes)
        if not self.on_gpu:
            return records
        # The allocator of pinned memory keeps it until the copy has ended.
        return records.pin_memory().to(self.to, non_blocking=True)

    def records(self, slots: list[int], start: int = 0, stop: int | None = None) -> Tensor:
        """Return a copy of the bytes `start .. stop - 1` of the records of slots `[n, bytes]`, in host memory."""
        with self._lock:
            self._settle()
            assert self._base is not None, "only slots that were taken are read"
            return self._base[:, start:stop][slots]

    def held(self, slots: list[int]) -> dict[str, Tensor]:
        """Return a copy of what slots hold, by name, each `[Hkv, n, ...]`, in host memory."""
        return self._views(self.records(slots))

    def fill(self, slots: list[int], tensors: Mapping[str, Tensor]) -> None:
        """Write what `held` returned; counted as bytes that went down."""
        self.tiers.traffic.down(self.tier, len(slots) * self.page_bytes)
        for name, tensor in tensors.items():
            self.tensors[name][:, slots] = tensor.to(self.tensors[name])

    @property
    def on_gpu(self) -> bool:
        """See `prefetch.Source`."""
        return self.to.type == "cuda"

    @property
    def prefetches(self) -> bool:
        """Whether there is something to gain from bringing pages up early: they lie in a file, or across a bus."""
        return self.tier == DISK or self.on_gpu

    def oldest(self, count: int) -> list[int]:
        """Return the slots in use that were written or read longest ago, at most so many."""
        used = [slot for slot, references in enumerate(self.references) if references]
        return sorted(used, key=self._touched.__getitem__)[:count]

    def hand_over(self, other: RecordPlane, slots: list[int]) -> dict[int, int]:
        """Move records with all their references to a plane of another tier; returns the handles, old to new.

        Raises:
            PoolExhaustedError: there is no room; nothing was moved.
        """
        targets = other.take(len(slots))
        other.import_from(self, slots, targets)
        for slot, target in zip(slots, targets, strict=True):
            other.references[target] = self.references[slot]
            self.references[slot] = 1
        self.release(slots)
        return {self.handle(old): other.handle(new) for old, new in zip(slots, targets, strict=True)}

    def _touch(self, slots: Iterable[int]) -> None:
        self._clock += 1
        self._touched.extend([0] * (self.slots - len(self._touched)))
        for slot in slots:
            self._touched[slot] = self._clock

    def _settle(self) -> None:
        """Wait until what a GPU copies here has come."""
        if self._down is not None:
            self._down.synchronize()
            self._down = None

    def _views(self, records: Tensor, start: int = 0, what: str = "") -> dict[str, Tensor]:
        """Return the tensors in records `[n, bytes]`, each `[Hkv, n, ...]`, as views.

        Args:
            records: whole ones, or of each the bytes from `start` on.
            start: see there.
            what: names of tensors begin so.
        """
        views = {}
        for name, tensor in self.tensors.items():
            if name.startswith(what):
                first, last = (at - start for at in self._parts[name])
                part = records[:, first:last].view(tensor.dtype)
                views[name] = part.view(records.shape[0], tensor.shape[0], *tensor.shape[2:]).transpose(0, 1)
        return views

    def _resize(self, slots: int) -> None:
        with self._lock:
            self._settle()
            made = self._storage(slots * self._record, None if self._base is None else self._base.flatten())
            self._base = made.view(slots, self._record)
            self.tensors = self._views(self._base)
        self._budget.reserved += self.nbytes - self._aside[0]
        self._aside[0] = self.nbytes
