"""Keys and values of one context, held in pages of 64 tokens.

A pool owns the memory of one layer; a page table says in which slot of the pool each page of the context lies, in any
order. Pages can be dropped (a bounded memory) and the context can be cut back to an earlier length (a question is
taken back, its document stays). Slots that nothing was written to may hold anything: they are never read.
It does not know about positions, several contexts in one pool, or formats other than the pool's float type.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError, UsageError
from longspan.kv.base import PAGE, LayerKV
from longspan.kv.rotary import Rotary

_DROPPED = -1


class PagePool:
    """The memory of one layer: slots of one page each, `[Hkv, slots, PAGE, D]`, growing by half when full.

    With heads first, pages in neighbouring slots are one stretch of memory a head and can be read without a copy.
    """

    def __init__(self, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Start without any slot."""
        self.keys = torch.empty(kv_heads, 0, PAGE, dim, dtype=dtype, device=device)
        self.values = torch.empty(kv_heads, 0, PAGE, value_dim, dtype=dtype, device=device)
        self._free: list[int] = []

    @property
    def slots(self) -> int:
        """Number of slots, used and free."""
        return self.keys.shape[1]

    @property
    def free(self) -> int:
        """Number of slots that hold no page."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, slots: int) -> None:
        """Make room for at least this many slots in all."""
        old = self.slots
        if slots > old:
            self.keys, self.values = _grown(self.keys, slots), _grown(self.values, slots)
            self._free.extend(range(slots - 1, old - 1, -1))

    def take(self) -> int:
        """Return a free slot, the lowest where possible, so that pages tend to lie in order."""
        if not self._free:
            self.reserve(max(8, self.slots + self.slots // 2))
        return self._free.pop()

    def give_back(self, slots: Iterable[int]) -> None:
        """Free slots; their contents are lost."""
        self._free.extend(slots)
        self._free.sort(reverse=True)


class PagedKV(LayerKV):
    """One layer's keys and values of one context (B = 1), in pages of a pool."""

    def __init__(self, pool: PagePool, rotary: Rotary | None = None) -> None:
        """Start an empty context."""
        self.pool, self.rotary = pool, rotary
        self.table: list[int] = []
        self._length = 0
        self._bounds: tuple[Tensor, Tensor] | None = None
        self._own: Tensor | None = None  # keys at their own positions, kept for mechanisms that read all of them
        self._own_length = 0
        self._slots: Tensor | None = None

    @property
    def length(self) -> int:
        """See `LayerKV`."""
        return self._length

    @property
    def pages_held(self) -> int:
        """Number of pages that were not dropped."""
        return sum(slot != _DROPPED for slot in self.table)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the unrotated keys `[1, Hkv, T, D]` and values `[1, Hkv, T, Dv]` of the next T tokens."""
        k, v = k[0].to(self.pool.keys.dtype), v[0].to(self.pool.values.dtype)
        done, new = 0, k.shape[1]
        while len(self.table) * PAGE < self._length + new:
            self.table.append(self.pool.take())
            self._slots = None
        while done < new:
            page, offset = divmod(self._length, PAGE)
            count = min(PAGE - offset, new - done)
            slot = self.table[page]
            assert slot != _DROPPED, "the page being written was dropped"
            self.pool.keys[:, slot, offset : offset + count] = k[:, done : done + count]
            self.pool.values[:, slot, offset : offset + count] = v[:, done : done + count]
            done += count
            self._length += count

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self._length:
            raise UsageError(f"a context of {self._length} tokens can't be cut to {length}")
        keep = -(-length // PAGE)
        self.pool.give_back(slot for slot in self.table[keep:] if slot != _DROPPED)
        del self.table[keep:]
        self._length, self._slots = length, None
        self._own_length = min(self._own_length, length)
        if self._bounds is not None:
            full = length // PAGE
            self._bounds = (self._bounds[0][:, :, :full], self._bounds[1][:, :, :full])

    def drop(self, start: int, stop: int) -> None:
        """Drop every page that lies wholly within the tokens `start .. stop - 1`."""
        first, last = -(-start // PAGE), min(stop, self._length) // PAGE
        slots = [self.table[page] for page in range(first, last) if self.table[page] != _DROPPED]
        if slots:
            self.pool.give_back(slots)
            self.table[first:last] = [_DROPPED] * (last - first)
            self._slots = None

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the pages held, in order, and which they are: what `restore` takes."""
        pages = [page for page, slot in enumerate(self.table) if slot != _DROPPED]
        slots = torch.tensor([self.table[page] for page in pages], dtype=torch.int64, device=self.pool.keys.device)
        keys, values = self.pool.keys[:, slots], self.pool.values[:, slots]
        if self._length % PAGE and pages and pages[-1] == len(self.table) - 1:
            # What lies behind the last token is whatever the memory held before: not for a file.
            keys[:, -1, self._length % PAGE :] = 0
            values[:, -1, self._length % PAGE :] = 0
        return {f"{prefix}pages": torch.tensor(pages, dtype=torch.int64), f"{prefix}k": keys, f"{prefix}v": values}

    def restore(self, prefix: str, length: int, tensors: dict[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens (SessionCorruptError if it does not fit)."""
        try:
            pages, keys, values = (tensors[f"{prefix}{name}"] for name in ("pages", "k", "v"))
        except KeyError as error:
            raise SessionCorruptError(f"the saved pages lack {error}: remove the session and read again") from error
        pool, count = self.pool, -(-length // PAGE)
        fits = (
            keys.shape == (pool.keys.shape[0], pages.numel(), PAGE, pool.keys.shape[-1])
            and values.shape == (pool.values.shape[0], pages.numel(), PAGE, pool.values.shape[-1])
            and (pages.numel() == 0 or 0 <= int(pages[0]) <= int(pages[-1]) < count)
            and bool((pages.diff() > 0).all())
        )
        if not fits:
            raise SessionCorruptError("the saved pages do not fit the model: remove the session and read again")
        self.truncate(0)
        pool.reserve(pages.numel())
        self.table = [_DROPPED] * count
        for i, page in enumerate(pages.tolist()):
            self.table[page] = slot = pool.take()
            pool.keys[:, slot], pool.values[:, slot] = keys[:, i].to(pool.keys), values[:, i].to(pool.values)
        self._length, self._slots, self._bounds = length, None, None

    def keys(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._read(self.pool.keys, start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._read(self.pool.values, start, stop)

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`; a reader of the whole context gets keys that were rotated once and kept."""
        if self.rotary is None or start > 0:
            return super().keys_at_own_positions(start, stop)
        if self._own is None or self._own.shape[2] < stop:
            capacity = max(4 * PAGE, stop + stop // 2)
            grown = self.pool.keys.new_empty(1, self.pool.keys.shape[0], capacity, self.pool.keys.shape[-1])
            if self._own is not None:
                grown[:, :, : self._own_length] = self._own[:, :, : self._own_length]
            self._own = grown
        if self._own_length < stop:
            fresh = self.rotary.range(self.keys(self._own_length, stop), self._own_length)
            self._own[:, :, self._own_length : stop] = fresh
            self._own_length = stop
        return self._own[:, :, :stop]

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._gather(self.pool.keys, index)

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._gather(self.pool.values, index)

    def page_bounds(self) -> tuple[Tensor, Tensor]:
        """See `LayerKV`; pages that were dropped keep the bounds they had."""
        full = self._length // PAGE
        known = 0 if self._bounds is None else self._bounds[0].shape[2]
        if self._bounds is None or known < full:
            fresh = self.keys(known * PAGE, full * PAGE).unflatten(2, (full - known, PAGE))
            lowest, highest = (fresh.amin(3), fresh.amax(3)) if full > known else (fresh[:, :, :, 0], fresh[:, :, :, 0])
            if self._bounds is None:
                self._bounds = (lowest, highest)
            else:
                self._bounds = (
                    torch.cat([self._bounds[0], lowest], 2),
                    torch.cat([self._bounds[1], highest], 2),
                )
        return self._bounds

    def _read(self, pool: Tensor, start: int, stop: int) -> Tensor:
        """Return tokens `start .. stop - 1` of a pool as `[1, Hkv, n, D]`: a view where the slots are neighbours."""
        assert 0 <= start <= stop <= self._length, f"{start}..{stop} of a context of {self._length}"
        if start == stop:
            return pool.new_empty(1, pool.shape[0], 0, pool.shape[-1])
        first, last = start // PAGE, -(-stop // PAGE)
        slots = self.table[first:last]
        assert _DROPPED not in slots, "a dropped page was asked for"
        if all(b - a == 1 for a, b in itertools.pairwise(slots)):
            pages = pool[:, slots[0] : slots[-1] + 1]
        else:
            pages = pool[:, torch.tensor(slots, device=pool.device)]
        return pages.flatten(1, 2)[:, start - first * PAGE : stop - first * PAGE].unsqueeze(0)

    def _gather(self, pool: Tensor, index: Tensor) -> Tensor:
        if self._slots is None:
            self._slots = torch.tensor(self.table, dtype=torch.int64)
        index = index.cpu()
        slot = self._slots[index // PAGE]
        assert bool((slot != _DROPPED).all()), "a dropped page was asked for"
        # int64 throughout: a pool of one layer of a 10M context passes 2^31 elements.
        flat = (slot * PAGE + index % PAGE).to(pool.device)
        return pool.flatten(1, 2)[:, flat].unsqueeze(0)


def _grown(pool: Tensor, slots: int) -> Tensor:
    grown = pool.new_empty(pool.shape[0], slots, *pool.shape[2:])
    grown[:, : pool.shape[1]] = pool
    return grown
