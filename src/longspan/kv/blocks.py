"""Summaries of one context's blocks: bounds and means, kept up to date as tokens arrive.

Kinds that the pool was made for are computed from a block's exact keys and values when it fills, into one slot a page,
which outlives the page itself and is shared by forks. Any other kind or block size is computed from what can be read
when it is first asked for, then kept and extended; those are in no budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kv.base import PAGE, LayerKV, summarise
from longspan.kv.pool import PagePool
from longspan.kv.tables import DROPPED, SlotTable

_SLAB = 64 * PAGE
"""Tokens that are summarised together when a whole context must be."""


class BlockSummaries:
    """Where a context's summaries lie, a slot of the pool's `marks` for each page, and those asked for beside them."""

    def __init__(self, pool: PagePool) -> None:
        """Start empty."""
        self.pool = pool
        self.table = SlotTable()
        self.asked: dict[tuple[str, int], Tensor] = {}
        self.wide: dict[tuple[bool, int], tuple[Tensor, int]] = {}
        """Bounds by whether they are of rotated keys, and block: rows with room for more, and how many there are."""

    @property
    def kept(self) -> bool:
        """Whether the pool keeps any summaries."""
        return bool(self.pool.summaries)

    def fork(self) -> BlockSummaries:
        """Return summaries in the same slots (the caller counts the references)."""
        other = BlockSummaries(self.pool)
        other.table, other.asked = self.table.copy(), dict(self.asked)
        return other

    def truncate(self, length: int) -> None:
        """Forget the blocks that are not full at `length` (the caller releases the slots)."""
        self.table.cut(-(-length // PAGE))
        self.asked = {key: kept[:, :, : length // key[1]] for key, kept in self.asked.items()}
        self.wide = {key: (rows, min(done, length // key[1])) for key, (rows, done) in self.wide.items()}

    def write(self, kv: LayerKV, start: int, k: Tensor, v: Tensor) -> None:
        """Summarise full blocks, of which `start` is the first token: k `[Hkv, n, D]` unrotated, v `[Hkv, n, Dv]`."""
        block = self.pool.block
        full = k.shape[1] // block
        k, v = k[:, : full * block], v[:, : full * block]
        rotated = None
        for what in self.pool.summaries:
            rows = v if what == "mean_value" else k
            if what.endswith("_rotated") and kv.rotary is not None:
                rows = rotated = kv.rotary.range(k, start) if rotated is None else rotated
            self._put(what, start // block, summarise(what, rows.unflatten(1, (full, block))))

    def get(self, kv: LayerKV, what: str, block: int) -> Tensor:
        """Return one summary of every full block, `[1, Hkv, N // block, D]`; see `LayerKV.summary`."""
        full = kv.length // block
        kept = what in self.pool.summaries and block % self.pool.block == 0
        if kept and block == self.pool.block:
            return self._read(what, 0, full)
        known = self.asked.get((what, block))
        done = 0 if known is None else known.shape[2]
        if known is None or done < full:
            if kept:
                ratio = block // self.pool.block
                finer = self._read(what, done * ratio, full * ratio)
                parts = [summarise(what, finer.unflatten(2, (full - done, ratio)))]
            else:
                slab = max(1, _SLAB // block)
                stops = [*range(done + slab, full, slab), full]
                starts = [done, *stops[:-1]]
                parts = [self._compute(kv, what, block, *ends) for ends in zip(starts, stops, strict=True)]
            known = torch.cat(parts if known is None else [known, *parts], 2)
            self.asked[what, block] = known
        return known

    def bounds(self, kv: LayerKV, block: int, rotated: bool) -> Tensor:
        """Return `LayerKV.bounds`, kept from one call to the next and extended by the blocks that are new."""
        rows, done = self.wide.get((rotated, block), (None, 0))
        full, ending = kv.length // block, "_rotated" if rotated else ""
        if rows is None or done < full:
            fresh = [self.get(kv, what + ending, block)[:, :, done:] for what in ("highest", "lowest")]
            if rows is None or rows.shape[2] < full:
                with torch.inference_mode(False):  # as in `Plane`: it is written to outside of inference mode too
                    more = fresh[0].new_empty(1, fresh[0].shape[1], full + full // 2 + 8, 2 * fresh[0].shape[3])
                if rows is not None:
                    more[:, :, :done] = rows[:, :, :done]
                rows = more
            rows[:, :, done:full] = torch.cat(fresh, -1)
            self.wide[rotated, block] = rows, full
        return rows[:, :, :full]

    def _compute(self, kv: LayerKV, what: str, block: int, first: int, last: int) -> Tensor:
        start, stop = first * block, last * block
        if what == "mean_value":
            rows = kv.values(start, stop)
        else:
            rows = kv.keys(start, stop)
            if what.endswith("_rotated") and kv.rotary is not None:
                rows = kv.rotary.range(rows, start)
        return summarise(what, rows.unflatten(2, (last - first, block)))

    def _put(self, what: str, first: int, blocks: Tensor) -> None:
        """Write the summaries `[Hkv, n, D]` of the blocks from `first` on."""
        held, per_page = self.pool.marks.tensors[what], PAGE // self.pool.block
        at = first + torch.arange(blocks.shape[1], device=held.device)
        slots = self.table.tensor(held.device)[at // per_page]
        held[:, slots, at % per_page] = blocks

    def _read(self, what: str, first: int, last: int) -> Tensor:
        held, per_page = self.pool.marks.tensors[what], PAGE // self.pool.block
        if first == last:
            return held.new_empty(1, held.shape[0], 0, held.shape[3])
        begin, end = first // per_page, -(-last // per_page)
        slot = self.table.run(begin, end)
        if slot is not None:
            assert slot != DROPPED, f"no {what} was kept of page {begin}"
            pages = held[:, slot : slot + end - begin]
        else:
            slots = self.table.slots[begin:end]
            assert DROPPED not in slots, f"no {what} was kept of page {begin + slots.index(DROPPED)}"
            pages = held[:, self.table.tensor(held.device)[begin:end]]
        return pages.flatten(1, 2)[:, first - begin * per_page : last - begin * per_page].unsqueeze(0)
