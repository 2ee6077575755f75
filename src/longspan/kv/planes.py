"""Slots of one page each: where keys and values, their summaries, or exact copies in host memory lie.

A plane is a few tensors `[Hkv, slots, ...]` and a reference count a slot. With heads first, pages in neighbouring slots
are one stretch of memory a head and can be read without a copy. A slot that no context refers to may hold anything: it
is never read. Planes do not count bytes against budgets (contexts do, before they take a slot): they only ask how much
memory they may set aside ahead of need.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan import large
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.coming import Coming, Rows
from longspan.kv.encodings import Format
from longspan.kv.tables import NATIVE

# A page's handle is its slot plus its plane's number times this: handles of plane 0, the native one, are slots.
SHIFT = NATIVE.bit_length() - 1
SLOT = (1 << SHIFT) - 1
"""What of a handle is the slot."""


class Plane:
    """Slots and their reference counts; grows by half when full, but not beyond what the budget has left."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        heads: int,
        device: torch.device,
        budget: Budget,
    ) -> None:
        """Start without any slot.

        Args:
            shapes: what a slot holds for each head, `name: (shape, dtype)`.
            heads: KV heads.
            device: where the tensors lie; host memory is pinned where the pool's own device is a GPU.
            budget: the root budget whose memory this is.
        """
        self.tensors = {
            name: torch.empty(heads, 0, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self.page_bytes = sum(heads * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())
        self.references: list[int] = []
        self.free_slots: list[int] = []  # the last is taken first
        self._budget, self._heads = budget, heads
        self._aside = [0]  # bytes counted in the budget, in a list so that the finalizer sees the latest
        budget.planes += 1
        weakref.finalize(self, _leave, budget, self._aside)

    @property
    def slots(self) -> int:
        """Number of slots, used and free."""
        return len(self.references)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def reserve(self, slots: int) -> None:
        """Make room for at least this many slots in all."""
        old = self.slots
        if slots > old:
            self._resize(slots)
            self.references.extend([0] * (slots - old))
            self.free_slots[:0] = range(slots - 1, old - 1, -1)

    def take(self, count: int = 1) -> list[int]:
        """Return free slots with one reference each, the lowest where possible, so that pages tend to lie in order."""
        lacking = count - len(self.free_slots)
        if lacking > 0:
            ahead = max(8, self.slots // 2) - lacking
            slack = self._budget.slack(self.page_bytes)
            self.reserve(self.slots + lacking + max(0, ahead if slack is None else min(ahead, slack)))
        taken = [self.free_slots.pop() for _ in range(count)]
        for slot in taken:
            self.references[slot] = 1
        return taken

    def share(self, slots: Iterable[int]) -> None:
        """Count one more reference to each slot."""
        references = self.references
        for slot in slots:
            assert references[slot] > 0, "a free slot was shared"
            references[slot] += 1

    def release(self, slots: Iterable[int]) -> None:
        """Count one reference less to each slot; those without any are free and their contents lost."""
        freed = []
        for slot in slots:
            assert self.references[slot] > 0, "a slot was freed twice"
            self.references[slot] -= 1
            if self.references[slot] == 0:
                freed.append(slot)
        if freed:
            self.free_slots.extend(freed)
            self.free_slots.sort(reverse=True)

    def copy(self, source: int, target: int) -> None:
        """Copy what one slot holds into another."""
        for tensor in self.tensors.values():
            tensor[:, target] = tensor[:, source]

    def compact(self) -> dict[int, int]:
        """Move slots to the front and give the rest of the memory back; returns where slots went, `{old: new}`."""
        used = [slot for slot, count in enumerate(self.references) if count]
        holes = [slot for slot in range(len(used)) if not self.references[slot]]
        moved = dict(zip(reversed([slot for slot in used if slot >= len(used)]), holes, strict=True))
        for old, new in moved.items():
            self.copy(old, new)
            self.references[new] = self.references[old]
        del self.references[len(used) :]
        self.free_slots = []
        self._resize(len(used))
        return moved

    def _resize(self, slots: int) -> None:
        for name, old in self.tensors.items():
            new = large.empty((old.shape[0], slots, *old.shape[2:]), old.dtype, old.device)
            kept = min(slots, old.shape[1])
            new[:, :kept] = old[:, :kept]
            self.tensors[name] = new
        self._budget.reserved += self.nbytes - self._aside[0]
        self._aside[0] = self.nbytes


@dataclass(frozen=True)
class Codes:
    """Rows of `k` or `v` as a plane's format holds them, where a row's codes mean the same in every page."""

    held: Tensor
    """Which of them it holds, bool `[Hkv, n]`; what the others are here means nothing."""
    codes: Tensor
    """`[Hkv, n, C]`."""
    scales: Tensor
    """`[Hkv, n, S]`."""

    def part(self, start: int, stop: int) -> Codes:
        """Return the rows `start .. stop - 1`."""
        return Codes(self.held[:, start:stop], self.codes[:, start:stop], self.scales[:, start:stop])


class PagePlane(Plane):
    """Pages of keys `k` and values `v` in one format, with their scales."""

    def __init__(
        self, number: int, made: Format, heads: int, dims: Mapping[str, int], device: torch.device, budget: Budget
    ) -> None:
        """Start without any slot; `dims` are the head sizes of `k` and of `v`, `number` the plane's in its pool."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for what, dim in dims.items():
            shapes[what] = ((PAGE, made.code_dim(what, dim)), made.code_dtype)
            shapes[f"{what}_scale"] = (made.scale_shape(what, dim), made.scale_dtype)
        self._coming: Coming | None = None
        super().__init__(shapes, heads, device, budget)
        self.number, self.format, self.dims = number, made, dict(dims)

    def handle(self, slot: int) -> int:
        """Return what stands for a slot of this plane in a page table."""
        return (self.number << SHIFT) + slot

    @property
    def coming(self) -> Coming | None:
        """Pages that are still in a file; None: all are here."""
        if self._coming is not None and not self._coming.left():
            self._coming = None
        return self._coming

    def expect(self, slots: Sequence[int], rows: Mapping[str, Rows]) -> None:
        """Have pages come to slots, which were taken for them, from a file as they are read (errors of `need`)."""
        self.need(None)  # those of an earlier file first
        self._coming = Coming(self, rows, slots, self.slots)

    def need(self, slots: Iterable[int] | slice | Tensor | None, *parts: str) -> None:
        """Return once what slots (None: all) hold of `k` and `v`, or one of them, is here.

        Raises:
            SessionError: a page can't be read from its file.
            SessionCorruptError: it is damaged there.
        """
        if self._coming is not None:
            for part in parts or ("k", "v"):
                self._coming.need(slots, part)

    def release(self, slots: Iterable[int]) -> None:
        """See `Plane.release`."""
        given = list(slots)
        super().release(given)
        if self._coming is not None:
            self._coming.forget(slot for slot in given if not self.references[slot])

    def copy(self, source: int, target: int) -> None:
        """See `Plane.copy`."""
        self.need([source])
        super().copy(source, target)

    def compact(self) -> dict[int, int]:
        """See `Plane.compact`."""
        self.need(None)
        return super().compact()

    def _resize(self, slots: int) -> None:
        with nullcontext() if self._coming is None else self._coming.still():
            super()._resize(slots)

    def import_from(self, other: PagePlane, sources: list[int], targets: list[int]) -> None:
        """Copy pages as they are from a plane of the same format, on whichever device."""
        assert other.format.coding == self.format.coding, "only pages of one format are copied as they are"
        other.need(sources)
        for name, tensor in self.tensors.items():
            tensor[:, targets] = other.tensors[name][:, sources].to(tensor.device)

    def write(self, slots: list[int], what: str, pages: Tensor) -> None:
        """Encode whole pages of `k` or `v` `[Hkv, n, PAGE, D]` into slots."""
        codes, scales = self.format.encode(pages, what)
        self.tensors[what][:, slots] = codes.to(self.tensors[what].device)
        self.tensors[f"{what}_scale"][:, slots] = scales.to(self.tensors[what].device)

    def moves(self, what: str) -> bool:
        """Return whether a row of `k` or `v` shares its scales with no other, so that its codes can be moved."""
        return self.tensors[f"{what}_scale"].shape[2] == PAGE

    def put(self, slots: list[int], what: str, given: Codes) -> None:
        """Take rows of whole pages as they are, where they are held; the others stay."""
        held = given.held.unflatten(1, (-1, PAGE)).unsqueeze(-1)
        for name, rows in ((what, given.codes), (f"{what}_scale", given.scales)):
            tensor = self.tensors[name]
            tensor[:, slots] = torch.where(held, rows.unflatten(1, (-1, PAGE)), tensor[:, slots])

    def codes(self, head: Tensor, slot: Tensor, offset: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of single tokens; arguments as for `rows`, of any one shape."""
        self.need(slot, what)
        row = (head * self.slots + slot) * PAGE + offset
        return self.tensors[what].flatten(0, 2)[row], self.tensors[f"{what}_scale"].flatten(0, 2)[row]

    def read(self, slots: slice | Tensor, what: str, dtype: torch.dtype) -> Tensor:
        """Return pages of `k` or `v` `[Hkv, n, PAGE, D]`; a view where slots are a slice and nothing is decoded."""
        self.need(slots, what)
        codes = self.tensors[what][:, slots]
        if self.format.code_dtype == dtype:
            return codes
        scales = self.tensors[f"{what}_scale"][:, slots]
        return self.format.decode(codes, scales, what, self.dims[what], dtype)

    def rows(self, head: Tensor, slot: Tensor, offset: Tensor, what: str, dtype: torch.dtype) -> Tensor:
        """Return single tokens of `k` or `v` `[n, D]`, given int64 `[n]` head, slot and place in the page."""
        self.need(slot, what)
        codes, scales = self.tensors[what], self.tensors[f"{what}_scale"]
        # int64 throughout: a pool of one layer of a 10M context passes 2^31 elements.
        page = head * self.slots + slot
        picked = codes.flatten(0, 2)[page * PAGE + offset]
        rows = scales.shape[2]
        scale = scales.flatten(0, 2)[page * rows + offset // (PAGE // rows)]
        return self.format.decode(picked, scale, what, self.dims[what], dtype)


def _leave(budget: Budget, aside: list[int]) -> None:
    """Take a plane that is gone out of its budget's memory."""
    budget.reserved -= aside[0]
    budget.planes -= 1
