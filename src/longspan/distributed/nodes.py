"""Summaries of whole units of a context, known to every rank, and of the blocks above them.

A unit's tokens lie on one rank (`shards.py`), which sends the unit's summaries to all once it is full and they are
first asked for: a few vectors a unit, whatever the context's length. Blocks of several units are put together from
them on every rank alike. It does not know what is summarised or why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.distributed.group import Group
from longspan.kv.base import summarise

if TYPE_CHECKING:
    from longspan.distributed.shards import Shards


class Nodes:
    """The summaries of one layer."""

    def __init__(self) -> None:
        """Start empty."""
        self._known: dict[tuple[str, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all summaries."""
        return sum(tensor.nbytes for tensor in self._known.values())

    def get(
        self, what: str, block: int, own: Callable[[str, int], Tensor], shards: Shards, total: int, group: Group
    ) -> Tensor:
        """Return one summary of every full block, `[1, Hkv, total // block, D]`; every rank asks for the same.

        Args:
            what: one of `kv.base.SUMMARIES`.
            block: tokens in a block, a multiple of the unit.
            own: returns the summaries of the full blocks of this rank's rows.
            shards: how units are dealt out.
            total: tokens of the context.
            group: the ranks.
        """
        full = total // block
        known = self._known.get((what, block))
        done = 0 if known is None else known.shape[2]
        if known is not None and done >= full:
            return known[:, :, :full]
        if block == shards.unit:
            fresh = _gathered(own(what, block), done, full, shards, group)
        else:
            ratio = block // shards.unit
            units = self.get(what, shards.unit, own, shards, total, group)[:, :, done * ratio : full * ratio]
            fresh = summarise(what, units.unflatten(2, (full - done, ratio)))
        known = self._known[what, block] = fresh if known is None else torch.cat([known, fresh], 2)
        return known

    def truncate(self, length: int) -> None:
        """Forget the blocks that are not full at `length`."""
        self._known = {key: kept[:, :, : length // key[1]] for key, kept in self._known.items()}

    def fork(self) -> Nodes:
        """Return the same summaries, which grow on their own."""
        other = Nodes()
        other._known = dict(self._known)
        return other


def _gathered(own: Tensor, first: int, last: int, shards: Shards, group: Group) -> Tensor:
    """Return the summaries of the units `first .. last - 1` of all ranks, `[1, Hkv, last - first, D]`."""
    ranks = shards.ranks
    most = -(-(last - first) // ranks)
    # Of each rank the units from its first one behind `first` on, as many as the rank with the most has.
    start = [-(-(first - rank) // ranks) for rank in range(ranks)]
    mine = own[:, :, max(0, start[shards.rank]) :][:, :, :most]
    lacking = most - mine.shape[2]
    if lacking:
        mine = torch.cat([mine, mine.new_zeros(*mine.shape[:2], lacking, mine.shape[3])], 2)
    every = group.gather(mine.contiguous())  # [P, 1, Hkv, most, D]
    units = range(first, last)
    rank, place = [unit % ranks for unit in units], [unit // ranks - start[unit % ranks] for unit in units]
    return every[rank, :, :, place].movedim(0, 2)
