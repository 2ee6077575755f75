"""Reading one context's pages, in whichever slots and formats they lie.

Where all pages asked for are neighbours of the native plane, what is returned is a view. It does not change anything
but what it keeps to read faster: `pages.py` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kv.base import PAGE, LayerKV
from longspan.kv.blocks import BlockSummaries
from longspan.kv.budget import Budget
from longspan.kv.encodings import Float8
from longspan.kv.mirror import Mirror
from longspan.kv.planes import SHIFT, SLOT, Codes
from longspan.kv.pool import PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.tables import DROPPED, SlotTable

_FP8 = Float8().coding
"""What kernels can read beside the native type."""
_RUNS = 16
"""Stretches of neighbouring slots that are read one by one; more of them are gathered plane by plane."""


class PageReader(LayerKV):
    """One layer's keys and values of one context (B = 1), in pages of a pool."""

    pool: PagePool
    rotary: Rotary | None
    budget: Budget
    pages: SlotTable
    blocks: BlockSummaries
    mirror: Mirror
    exact: dict[int, int]
    """Pages that have a copy below, more exact than what is held, and its handle there."""
    reads_below: bool = False
    """Whether a page of which nothing else is held is read from its copy below, at the price of moving it."""
    window: int | None = None
    """How many of the newest keys this layer of the model ever sees; None: all, as the way of attending likes."""
    _read_below: Sequence[int] = ()
    """Pages that were read from there last."""
    _length: int

    @property
    def length(self) -> int:
        """See `LayerKV`."""
        return self._length

    @property
    def table(self) -> list[int]:
        """Where each page lies: a handle of the pool, its slot where it is held in the native type."""
        return self.pages.slots

    @property
    def kv_heads(self) -> int:
        """See `LayerKV`."""
        return self.pool.kv_heads

    def keys(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._read("k", start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._read("v", start, stop)

    def known_keys(self, start: int, stop: int) -> Tensor:
        """Return what is known of unrotated keys, `[1, Hkv, stop - start, D]`, whether they can be read or not.

        A page that was demoted gives its copy below, or else what is held, be it its mean key for each of its
        tokens: enough to find it.
        """
        readable = self.readable()
        if (readable is None and not self.exact) or start == stop:
            return self.keys(start, stop)
        first, last = start // PAGE, -(-stop // PAGE)
        held = torch.ones(last - first, dtype=torch.bool) if readable is None else readable[first:last].cpu()
        held[[page - first for page in self.exact if first <= page < last]] = False
        at = held.nonzero().flatten()
        known = self.whole_pages(at + first, "k")
        out = known.new_empty(known.shape[0], last - first, *known.shape[2:])
        out[:, at] = known
        away = ((~held).nonzero().flatten() + first).tolist()
        copied, lost = [page for page in away if page in self.exact], [page for page in away if page not in self.exact]
        if copied:
            out[:, torch.tensor(copied) - first] = self.copies(copied, "k")
        if lost:
            out[:, torch.tensor(lost) - first] = self.summary("mean_key")[0][:, lost].unsqueeze(2)
        return out.flatten(1, 2)[:, start - first * PAGE : stop - first * PAGE].unsqueeze(0)

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        found: Tensor = self._gather("k", index.reshape(1, -1))
        return found.view(1, found.shape[0], *index.shape, -1)

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        found: Tensor = self._gather("v", index.reshape(1, -1))
        return found.view(1, found.shape[0], *index.shape, -1)

    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        index = index.to(self.pool.device)
        v = self._gather("v", index[0]).unsqueeze(0)
        if rotated and self._all_rotated:
            self.keys_at_own_positions(0, self._length)
            return _rows(self.mirror.held[0], index[0]).unsqueeze(0), v
        k = self._gather("k", index[0]).unsqueeze(0)
        return (self.rotary(k, index) if rotated and self.rotary is not None else k), v

    def gather_codes(self, index: Tensor) -> dict[str, Codes]:
        """Return the rows in `index`, int64 `[Hkv, F]`, as the pool's format holds them, by `k` and `v`.

        Left out is what can't be moved to another page as it is, and everything where no page is in that format.
        """
        pool = self.pool
        plane = pool.plane(pool.format.name)
        handle = self.pages.tensor(pool.device)[index // PAGE]
        held = handle >> SHIFT == plane.number
        if plane is pool.native or not bool(held.any()):
            return {}
        head = torch.arange(pool.kv_heads, device=pool.device).unsqueeze(1).expand_as(index)
        slot = (handle & SLOT).where(held, torch.zeros_like(handle))
        return {
            what: Codes(held, *plane.codes(head, slot, index % PAGE, what)) for what in ("k", "v") if plane.moves(what)
        }

    def gather_blocks(self, blocks: Tensor, size: int, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`; a block is one row of memory where pages are held as they came."""
        if not self.pages.plain or PAGE % size:
            return super().gather_blocks(blocks, size, rotated=rotated)
        pool, each = self.pool, PAGE // size
        wanted = blocks[0].to(pool.device)
        slot = self.pages.run(0, len(self.table))
        if pool.native.coming is not None:
            pool.native.need(self.pages.tensor(pool.device)[wanted // each])
        if slot is None:
            rows = self.pages.tensor(pool.device)[wanted // each] * each + wanted % each
        else:
            rows = wanted + slot * each if slot else wanted
        v = _blocks(pool.values, rows, size)
        if rotated and self._all_rotated:
            if self.mirror.length < self._length:
                self.keys_at_own_positions(0, self._length)
            return _blocks(self.mirror.held[0], wanted, size).unsqueeze(0), v.unsqueeze(0)
        k = _blocks(pool.keys, rows, size)
        if rotated and self.rotary is not None:
            at = (wanted.unsqueeze(-1) * size + torch.arange(size, device=pool.device)).flatten(1)
            k = self.rotary(k, at)
        return k.unsqueeze(0), v.unsqueeze(0)

    @property
    def mirrored(self) -> bool:
        """Whether rotated keys are kept: where memory is not limited, and for pages that are held as they came."""
        return self.rotary is not None and self.pages.plain and not self.budget.limited

    @property
    def _all_rotated(self) -> bool:
        """Whether single keys are taken from the rotated ones: not while that would bring every page from a file."""
        coming = self.pool.native.coming
        return self.mirrored and (coming is None or not coming.left("k"))

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`; a reader of the whole context, or on a CPU of a window, gets keys rotated once and kept."""
        rotated = super().keys_at_own_positions
        if self.mirrored and (start == 0 or stop <= self.mirror.length):
            return self.mirror.read(stop, rotated)[:, :, start:]
        return self.mirror.near(start, stop, rotated) if start > 0 and self._keeps_near else rotated(start, stop)

    @property
    def _keeps_near(self) -> bool:
        """Whether a window's rotated keys are kept: on a CPU, as in `mirrored`, but whatever was dropped before it."""
        as_they_came = self.pool.format is self.pool.native.format and not self.exact
        return self.rotary is not None and as_they_came and not self.budget.limited and self.pool.device.type == "cpu"

    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """See `LayerKV`."""
        return self.blocks.get(self, what, block)

    def held(self, what: str, *, whole: bool = False) -> Held | None:
        """See `LayerKV`: where all pages are in the native type or fp8."""
        for each in self.pool.planes:
            each.need(None, what)
        native = self.pool.native.tensors[what]
        table = self.pages.tensor(self.pool.device).unsqueeze(0)
        if self.pages.plain and whole and (slot := self.pages.run(0, len(self.table))) is not None:
            # No slot need be looked up, and a kernel may bring more than a page at once.
            rows = native[:, slot : slot + len(self.table)].flatten(1, 2)[:, : self._length]
            return Held(rows.unsqueeze(0))
        if self.pages.plain:
            return Held(native, table)
        planes = {handle >> SHIFT for handle in self.table}
        others = [plane for plane in self.pool.planes if plane.number in planes and plane is not self.pool.native]
        if min(planes) < 0 or len(others) != 1 or others[0].format.coding != _FP8:
            return None
        plane = others[0]
        scales = plane.tensors[f"{what}_scale"].flatten(1)
        return Held(native, table, plane.tensors[what], scales, SHIFT)

    def bounds(self, block: int, *, rotated: bool) -> Tensor:
        """See `LayerKV`; a CPU keeps them side by side, since scoring takes as long as it takes to read them."""
        if self.pool.device.type != "cpu" or self.budget.limited:
            return super().bounds(block, rotated=rotated)
        return self.blocks.bounds(self, block, rotated)

    def columns(self, count: int, *, rotated: bool) -> Tensor:
        """See `LayerKV`; they are kept where rotated keys are."""
        readable = self.readable()
        if readable is None:
            whole = super().keys_at_own_positions if rotated else self.keys
            if self.pages.plain and not self.budget.limited:
                return self.mirror.columns(count, rotated, lambda start, stop: whole(start, stop).mT)
            return whole(0, count).mT
        pages = readable[: -(-count // PAGE)].nonzero().flatten()
        keys = torch.zeros(self.pool.kv_heads, -(-count // PAGE), *self.whole_pages(pages[:0], "k").shape[2:])
        keys = keys.to(self.pool.device, self.pool.dtype)
        keys[:, pages] = self.whole_pages(pages, "k")
        held = keys.flatten(1, 2)[:, :count].unsqueeze(0)
        return (self.rotary.range(held, 0) if rotated and self.rotary is not None else held).mT

    def readable(self) -> Tensor | None:
        """See `LayerKV`."""
        if self.pages.plain:
            return None
        held = self.pages.tensor(self.pool.device) != DROPPED
        if self.reads_below and self.exact:
            held[torch.tensor(list(self.exact), device=held.device)] = True
        return None if bool(held.all()) else held

    def _read(self, what: str, start: int, stop: int) -> Tensor:
        """Return the keys `k` or values `v` of tokens `start .. stop - 1` as `[1, Hkv, n, D]`."""
        pool = self.pool
        assert 0 <= start <= stop <= self._length, f"{start}..{stop} of a context of {self._length}"
        if start == stop:
            return torch.empty(1, pool.kv_heads, 0, pool.dims[what], dtype=pool.dtype, device=pool.device)
        first, last = start // PAGE, -(-stop // PAGE)
        handle = self.pages.run(first, last)
        if self.reads_below and self._below(first, last):
            pages = self.whole_pages(torch.arange(first, last), what)
        elif handle is not None:
            assert handle != DROPPED, "a dropped page was asked for"
            plane, slot = pool.find(handle)
            pages = plane.read(slice(slot, slot + last - first), what, pool.dtype)
        elif self.pages.native(first, last):
            pages = pool.native.read(self.pages.tensor(pool.device)[first:last], what, pool.dtype)
        else:
            pages = self._several(first, last, what)
        return pages.flatten(1, 2)[:, start - first * PAGE : stop - first * PAGE].unsqueeze(0)

    def whole_pages(self, which: Tensor, what: str) -> Tensor:
        """Return `k` or `v` of the pages in `which` (int64 `[n]`) as `[Hkv, n, PAGE, D]`, behind the last token too."""
        pool = self.pool
        handles = self.pages.tensor(pool.device)[which.to(pool.device)]
        away = (handles == DROPPED).nonzero().flatten()
        out = torch.empty(pool.kv_heads, len(which), PAGE, pool.dims[what], dtype=pool.dtype, device=pool.device)
        if away.numel():
            out[:, away] = self._from_copies(which.to(pool.device)[away].tolist(), what)
        for plane in pool.planes:
            mine = (handles >> SHIFT == plane.number).nonzero().flatten()
            if mine.numel():
                out[:, mine] = plane.read(handles[mine] & SLOT, what, pool.dtype)
        return out

    def copies(self, pages: Sequence[int], what: str) -> Tensor:
        """Return `k` or `v` of pages that have a copy below, as `[Hkv, n, PAGE, D]` on the pool's device."""
        pool = self.pool
        out = torch.empty(pool.kv_heads, len(pages), PAGE, pool.dims[what], dtype=pool.dtype, device=pool.device)
        handles = [self.exact[page] for page in pages]
        for below, mine in pool.by_plane_below(handles).items():
            out[:, mine] = below.pages([handles[i] & SLOT for i in mine], what, pool.dtype)
        return out

    def prefetch(self, pages: Sequence[int] | None = None) -> None:
        """Ask for pages that will be read soon and lie below; None: those that were read from there last."""
        wanted = [self.exact[p] for p in (self._read_below if pages is None else pages) if self._away(p)]
        for below, mine in self.pool.by_plane_below(wanted).items():
            if below.prefetches:
                self.pool.tiers.prefetcher.want(below, [wanted[i] & SLOT for i in mine])

    def _away(self, page: int) -> bool:
        return page in self.exact and page < len(self.table) and self.table[page] == DROPPED

    def _below(self, first: int, last: int) -> bool:
        """Whether one of the pages `first .. last - 1` is held below alone."""
        return not self.pages.plain and DROPPED in self.table[first:last]

    def _from_copies(self, pages: list[int], what: str) -> Tensor:
        """Return `k` or `v` of pages that are held below alone, as `copies` does."""
        assert self.reads_below and all(page in self.exact for page in pages), "a dropped page was asked for"
        self._read_below = pages
        return self.copies(pages, what)

    def _several(self, first: int, last: int, what: str) -> Tensor:
        """Return `k` or `v` of neighbouring pages in several planes or places, as `whole_pages` does."""
        runs = self.pages.runs(first, last)
        if len(runs) > _RUNS:
            return self.whole_pages(torch.arange(first, last), what)
        parts = []
        for start, stop in runs:
            handle = self.table[start]
            assert handle != DROPPED, "a dropped page was asked for"
            plane, slot = self.pool.find(handle)
            parts.append(plane.read(slice(slot, slot + stop - start), what, self.pool.dtype))
        return torch.cat(parts, 1)

    def _gather(self, what: str, index: Tensor) -> Tensor:
        """Return `k` or `v` `[Hkv, F, D]` of the tokens that each head (or, `[1, F]`, every head) wants."""
        pool = self.pool
        index = index.to(pool.device)
        handle, offset = self.pages.tensor(pool.device)[index // PAGE], index % PAGE
        if self.pages.plain:
            pool.native.need(handle, what)
            held = pool.native.tensors[what].flatten(1, 2)
            # int64 throughout: a pool of one layer of a 10M context passes 2^31 elements.
            flat = handle * PAGE + offset
            return held[:, flat[0]] if index.shape[0] == 1 else _rows(held, flat)
        shape = (pool.kv_heads, index.shape[1])
        head = torch.arange(pool.kv_heads, device=pool.device).unsqueeze(1).expand(shape).flatten()
        handle, offset = handle.expand(shape).flatten(), offset.expand(shape).flatten()
        out = torch.empty(len(head), pool.dims[what], dtype=pool.dtype, device=pool.device)
        away = (handle == DROPPED).nonzero().flatten()
        if away.numel():
            page = (index // PAGE).expand(shape).flatten()[away]
            pages, where = page.unique(return_inverse=True)
            out[away] = self._from_copies(pages.tolist(), what)[head[away], where, offset[away]]
        for plane in pool.planes:
            mine = (handle >> SHIFT == plane.number).nonzero().flatten()
            if mine.numel():
                out[mine] = plane.rows(head[mine], handle[mine] & SLOT, offset[mine], what, pool.dtype)
        return out.view(*shape, -1)


def _rows(held: Tensor, index: Tensor) -> Tensor:
    """Return the rows `[Hkv, F, D]` that each head chose by `[Hkv, F]` of `[Hkv, n, D]`."""
    heads, tokens, dim = held.shape
    chosen = index + torch.arange(heads, device=index.device).unsqueeze(1) * tokens
    return held.view(heads * tokens, dim)[chosen.flatten()].view(heads, -1, dim)


def _blocks(held: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the blocks `[Hkv, P * size, D]` that each head chose by `[Hkv, P]` of all its rows, `[Hkv, ..., D]`."""
    heads, dim = held.shape[0], held.shape[-1]
    rows = held.view(-1, size * dim)
    # Copies rows several times as fast as an index does.
    found = torch.embedding(rows, index + _starts(heads, rows.shape[0] // heads, index.device))
    return found.view(heads, -1, dim)


@functools.lru_cache(maxsize=64)
def _starts(heads: int, rows: int, device: torch.device) -> Tensor:
    """Return the first row of each head, `[Hkv, 1]`."""
    with torch.inference_mode(False):
        return torch.arange(0, heads * rows, rows, device=device).unsqueeze(1)
