"""What goes to a file of one layer's pages, and what comes back.

Tensors by name: `pages`, `k` and `v` of the pages in the native type; `FORMAT.pages`, `FORMAT.k`, `FORMAT.k_scale`
and so on of those in another format, named with the options that say what its codes mean; `host.*` of copies below the
device, in the same way; `marks.*` of the summaries of pages, and which of these are more exact than what is held
(`marks.rounded`); `asked.KIND.BLOCK` of summaries that the pool does not keep itself; `memory.*` of what a mechanism
remembers beside pages.
Pages of a file stay there until they are read (`coming.py`). Earlier versions saved no summaries that can be computed
again. It does not know files: the sessions' store does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError, UsageError
from longspan.kv import formats
from longspan.kv.base import PAGE, SUMMARIES
from longspan.kv.coming import Rows, rows_in
from longspan.kv.encodings import Format
from longspan.kv.memory import LayerMemory
from longspan.kv.planes import SLOT, PagePlane, Plane
from longspan.kv.pool import PagePool
from longspan.kv.tables import DROPPED, NATIVE, SlotTable
from longspan.kv.tiers import HOST

if TYPE_CHECKING:
    from longspan.kv.pages import PagedKV

MEMORY = "memory."
"""What the names of remembered tensors begin with, behind the layer's prefix."""
_PARTS = ("k", "v", "k_scale", "v_scale", *SUMMARIES)
_ROUNDED = "marks.rounded"
_TOGETHER = 512  # numbers of pages that are one row
_AHEAD = 8  # pages


def pack(kv: PagedKV, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a context, each name with a prefix."""
    pool, out = kv.pool, {}
    for plane in pool.planes:
        held = [page for page, handle in enumerate(kv.table) if handle != DROPPED and pool.find(handle)[0] is plane]
        if held or plane is pool.native:
            slots = [pool.find(kv.table[page])[1] for page in held]
            out.update(_plane_tensors(plane, slots, held, kv.length, _prefix(pool, plane.format)))
    for made in {below.format.coding: below.format for below in pool.below}.values():
        copied = [page for page in sorted(kv.exact) if pool.find_below(kv.exact[page])[0].format.coding == made.coding]
        if copied:
            found = _copies(pool, [kv.exact[page] for page in copied])
            prefix_below = f"host.{_prefix(pool, made)}"
            out[f"{prefix_below}pages"] = torch.tensor(copied, dtype=torch.int64)
            for name, tensor in found.items():
                if _saves(tensor):
                    whole = tensor.shape[2] == PAGE
                    out[prefix_below + name] = _without_tail(tensor, copied, kv.length, 1) if whole else tensor
    kept = [page for page, mark in enumerate(kv.blocks.table.slots) if mark != DROPPED]
    if kept:
        marks = [kv.blocks.table.slots[page] for page in kept]
        out["marks.pages"] = torch.tensor(kept, dtype=torch.int64)
        out[_ROUNDED] = torch.tensor(sorted(kv.rounded), dtype=torch.int64)
        for what, tensor in pool.marks.tensors.items():
            out[f"marks.{what}"] = _without_tail(tensor[:, marks], kept, kv.length, pool.block)
    if not kv.pages.plain:
        for (what, block), tensor in kv.blocks.asked.items():
            out[f"asked.{what}.{block}"] = tensor[0].contiguous()
    return {prefix + name: tensor for name, tensor in out.items()}


def rows_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int, list[int] | None]]:
    """Return which of a context's tensors are rows that stay what they are as the context grows.

    Returns:
        By name: the axis of the rows, how many of its places are one, and their numbers (None: 0, 1, 2 and so on). Of
        the tensors of pages these are the pages'.
    """
    found: dict[str, tuple[int, int, list[int] | None]] = {}
    for name, tensor in tensors.items():
        if name.endswith("pages"):
            pages: list[int] = tensor.tolist()
            found[name] = (0, _TOGETHER, None)
            for part in _PARTS:
                rows = tensors.get(name.removesuffix("pages") + part)
                if rows is not None and rows.shape[1] == len(pages):
                    found[name.removesuffix("pages") + part] = (1, 1, pages)
        elif name.rpartition("asked.")[1]:
            found[name] = (1, PAGE, None)
    return found


@dataclass
class Parts:
    """Saved tensors that were found to fit a context."""

    groups: dict[PagePlane, tuple[list[int], Mapping[str, Rows]]]
    exact: dict[str, tuple[Format, list[int], Mapping[str, Rows]]]
    marks: tuple[list[int], Mapping[str, Rows]]
    rounded: set[int]
    """Pages whose summaries are more exact than what is held of them."""
    asked: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def summarised(self) -> list[int]:
        """Pages that have summaries: those that can be read, and those whose summaries were saved."""
        return sorted({page for pages, _ in self.groups.values() for page in pages} | set(self.marks[0]))

    def takes(self, pool: PagePool) -> dict[Plane, int]:
        """Return how many slots of each plane are needed."""
        takes: dict[Plane, int] = {plane: len(pages) for plane, (pages, _) in self.groups.items()}
        takes[pool.marks] = len(self.summarised) if pool.summaries else 0
        return takes

    def below_bytes(self, pool: PagePool) -> int:
        """Return the bytes that copies take in the tiers below."""
        return sum(pool.plane_below(made, HOST).page_bytes * len(pages) for made, pages, _ in self.exact.values())

    def unpack(self, kv: PagedKV) -> None:
        """Fill an empty context whose length is set and whose bytes are counted."""
        pool, count = kv.pool, -(-kv.length // PAGE)
        handles = [DROPPED] * count
        for plane, (pages, rows) in self.groups.items():
            # Room for a question and its answer, so that nothing moves while pages come.
            plane.reserve(len(pages) + (0 if pool.budget.limited else _AHEAD))
            slots = plane.take(len(pages))
            if pages and not any(each.here for each in rows.values()):
                plane.expect(slots, rows)
            else:
                _fill(plane, slots, rows)
            for page, slot in zip(pages, slots, strict=True):
                handles[page] = plane.handle(slot)
        kv.pages = SlotTable(handles)
        if kv.length % PAGE and handles[-1] != DROPPED:  # the next token is written beside what it holds
            plane, slot = pool.find(handles[-1])
            plane.need([slot])
        kv.exact = {}
        for made, pages, rows in self.exact.values():
            places = pool.place_below(made, len(pages))
            copies = {name: each.read(0, len(pages)) for name, each in rows.items()}
            for below in dict.fromkeys(below for below, _ in places):
                mine = [i for i, (plane_below, _) in enumerate(places) if plane_below is below]
                below.fill([places[i][1] for i in mine], {name: tensor[:, mine] for name, tensor in copies.items()})
            kv.exact.update((page, below.handle(slot)) for page, (below, slot) in zip(pages, places, strict=True))
        if pool.summaries:
            self._summaries(kv, count)
        kv.blocks.asked = {key: tensor.to(pool.device, pool.dtype).unsqueeze(0) for key, tensor in self.asked.items()}

    def _summaries(self, kv: PagedKV, count: int) -> None:
        pool, block = kv.pool, kv.pool.block
        summarised, marks = self.summarised, [DROPPED] * count
        for page, mark in zip(summarised, pool.marks.take(len(summarised)), strict=True):
            marks[page] = mark
        kv.blocks.table = SlotTable(marks)
        saved, rows = self.marks
        kv.rounded = {page for page in self.rounded if 0 <= kv.table[page] < NATIVE}
        if saved:
            _fill(pool.marks, [marks[page] for page in saved], rows)
        for page in sorted(set(summarised) - set(saved)):
            start, stop = page * PAGE, min((page + 1) * PAGE, kv.length // block * block)
            if stop > start:
                kv.blocks.write(kv, start, kv.keys(start, stop)[0], kv.values(start, stop)[0])


def checked(kv: PagedKV, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> Parts:
    """Return what a context of `length` tokens would hold (SessionCorruptError if it does not fit); changes nothing."""
    pool, count = kv.pool, -(-length // PAGE)
    names = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}

    def group(part: str, plane: Plane) -> tuple[list[int], Mapping[str, Rows]]:
        return _group(tensors, f"{prefix}{part}", plane, count)

    groups = {pool.native: group("", pool.native)}
    exact: dict[str, tuple[Format, list[int], Mapping[str, Rows]]] = {}
    for name in names:
        if name.endswith("pages") and name not in ("pages", "marks.pages"):
            in_host, spec = name.startswith("host."), name.removeprefix("host.").removesuffix("pages").removesuffix(".")
            made = _format(pool, spec)
            part = name.removesuffix("pages")
            if in_host:
                exact[made.coding] = (made, *group(part, pool.plane_below(made, HOST)))
            else:
                plane = pool.plane_of(made)
                groups[plane] = group(part, plane)
    pages = [page for found, _ in groups.values() for page in found]
    marks = group("marks.", pool.marks) if pool.summaries and "marks.pages" in names else ([], {})
    rounded = set(tensors[names[_ROUNDED]].tolist() if _ROUNDED in names else marks[0])
    asked = {}
    for name, stored in names.items():
        if name.startswith("asked."):
            tensor = tensors[stored]
            what, _, block = name.removeprefix("asked.").rpartition(".")
            dim = pool.dims["v" if what == "mean_value" else "k"]
            if not block.isdigit() or int(block) == 0 or tensor.shape[::2] != (pool.kv_heads, dim):
                raise _unfit()
            if tensor.shape[1] > length // int(block):
                raise _unfit()
            asked[what, int(block)] = tensor
    copied = [page for _, found, _ in exact.values() for page in found]
    if len(set(pages)) != len(pages) or len(set(copied)) != len(copied):
        raise _unfit()
    return Parts(groups, exact, marks, rounded, asked)


def remembered(
    kv: PagedKV, prefix: str, length: int, tensors: Mapping[str, Tensor], parts: Parts
) -> LayerMemory | None:
    """Return what a mechanism remembered of a context of `length` tokens; None: it keeps nothing beside pages.

    Raises:
        SessionCorruptError: it does not fit, or it has not seen every token whose page is gone.
        PoolExhaustedError: the budget has no room for it.
    """
    if kv.memory is None:
        return None
    memory = kv.memory.restored(f"{prefix}{MEMORY}", length, tensors)
    held = {page for pages, _ in parts.groups.values() for page in pages}
    if not held.issuperset(range(memory.length // PAGE, -(-length // PAGE))):
        memory.truncate(0)
        raise _unfit()
    return memory


def _group(
    tensors: Mapping[str, Tensor], prefix: str, plane: Plane, count: int
) -> tuple[list[int], Mapping[str, Rows]]:
    """Return the pages of one group and its tensors, by the plane's names."""
    try:
        pages = tensors[f"{prefix}pages"]
        # A format without scales has nothing to save of them.
        found = {name: rows_in(tensors, f"{prefix}{name}") for name, held in plane.tensors.items() if _saves(held)}
    except KeyError as error:
        raise SessionCorruptError(f"the saved pages lack {error}: remove the session and read again") from error
    fits = (
        pages.dim() == 1
        and (pages.numel() == 0 or 0 <= int(pages[0]) <= int(pages[-1]) < count)
        and bool((pages.diff() > 0).all())
        and all(
            tuple(found[name].shape) == (tensor.shape[0], pages.numel(), *tensor.shape[2:])
            for name, tensor in plane.tensors.items()
            if name in found
        )
    )
    if not fits:
        raise _unfit()
    return pages.tolist(), found


def _plane_tensors(plane: PagePlane, slots: list[int], pages: list[int], length: int, prefix: str) -> dict[str, Tensor]:
    plane.need(slots)
    out = {f"{prefix}pages": torch.tensor(pages, dtype=torch.int64)}
    for name, tensor in plane.tensors.items():
        if _saves(tensor):
            whole = tensor[:, slots]
            out[f"{prefix}{name}"] = _without_tail(whole, pages, length, 1) if tensor.shape[2] == PAGE else whole
    return out


def _without_tail(pages: Tensor, numbers: list[int], length: int, block: int) -> Tensor:
    """Zero what lies behind the last token: whatever the memory held before is not for a file."""
    if length % PAGE and numbers and numbers[-1] == length // PAGE:
        pages[:, -1, length % PAGE // block :] = 0
    return pages


def _fill(plane: Plane, slots: list[int], rows: Mapping[str, Rows]) -> None:
    one_after_the_other = bool(slots) and slots == list(range(slots[0], slots[0] + len(slots)))
    at = slice(slots[0], slots[0] + len(slots)) if one_after_the_other else slots
    for name, each in rows.items():
        target = plane.tensors[name]
        target[:, at] = each.read(0, len(slots)).to(target)


def _saves(tensor: Tensor) -> bool:
    return tensor.shape[-1] > 0


def _prefix(pool: PagePool, made: Format) -> str:
    return "" if made is pool.native.format else f"{made.coding}."


def _copies(pool: PagePool, handles: list[int]) -> dict[str, Tensor]:
    """Return the tensors of copies below in one format, in whichever tiers they lie, by name."""
    out: dict[str, Tensor] = {}
    for below, mine in pool.by_plane_below(handles).items():
        slots = [handles[i] & SLOT for i in mine]
        for name, tensor in below.held(slots).items():
            if name not in out:
                out[name] = tensor.new_empty(tensor.shape[0], len(handles), *tensor.shape[2:])
            out[name][:, mine] = tensor
    return out


def _format(pool: PagePool, spec: str) -> Format:
    """Return the format that codes were written in; the native type is not named."""
    try:
        return formats.format_of(spec or None, pool.dtype)
    except UsageError as error:
        raise SessionCorruptError(f"the saved pages can't be read: {error}") from error


def _unfit() -> SessionCorruptError:
    return SessionCorruptError("the saved pages do not fit the model: remove the session and read again")
