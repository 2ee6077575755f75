"""Which positions of a context each rank holds, and in which rows.

A layout gives every rank runs of positions, ascending, which lie one after the other in the rank's rows. Three orders:

- `zigzag`: 2P equal runs, of which rank r holds number r and number 2P-1-r, so that causal attention is the same work
  on every rank (the order of zigzag ring attention; Striped Attention, arXiv 2311.09431, balances token by token);
- `contiguous`: P runs, what star attends to;
- `interleaved`: blocks dealt out in turn, where a position's rank doesn't depend on how long the context becomes.

A context that is read in chunks has one layout a chunk; their sum (`+`) is the layout of all. Any length serves: runs
differ by at most one token, and may be empty. It knows no tensors but those it cuts, and no process groups.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.errors import UsageError

Run = tuple[int, int]
"""First position, and the one behind the last."""


@dataclass(frozen=True)
class Layout:
    """Runs of positions, ascending, for every rank; together they are the positions `first .. stop - 1`, each once."""

    runs: tuple[tuple[Run, ...], ...]

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(self.runs)

    @functools.cached_property
    def first(self) -> int:
        """The first position of all; 0 where there is none."""
        return min((own[0][0] for own in self.runs if own), default=0)

    @functools.cached_property
    def stop(self) -> int:
        """The position behind the last of all."""
        return max((own[-1][1] for own in self.runs if own), default=self.first)

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many positions each rank holds."""
        return tuple(sum(stop - start for start, stop in own) for own in self.runs)

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the positions of a rank's rows, int64 `[count]`, ascending."""
        parts = [torch.arange(start, stop, device=device) for start, stop in self.runs[rank]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)

    def before(self, rank: int, position: int) -> int:
        """Return how many of a rank's rows are of positions before this one: they are its first rows."""
        starts, rows = self._index[rank]
        at = bisect.bisect_right(starts, position) - 1
        if at < 0:
            return 0
        start, stop = self.runs[rank][at]
        return rows[at] + min(position, stop) - start

    def place(self, position: int) -> tuple[int, int]:
        """Return the rank that holds a position, and its row there (UsageError: no rank does)."""
        for rank in range(self.ranks):
            row = self.before(rank, position)
            if self.before(rank, position + 1) > row:
                return rank, row
        raise UsageError(f"position {position} is not among {self.first} to {self.stop - 1}: use one of these")

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """Return a rank's rows of a tensor that has all positions from `first` on along `dim`."""
        parts = [x.narrow(dim, start - self.first, stop - start) for start, stop in self.runs[rank]]
        if not parts:
            return x.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def whole(self, shards: Sequence[Tensor], dim: int = 2) -> Tensor:
        """Return all positions in order from every rank's rows: the inverse of `shard`."""
        for shard, count in zip(shards, self.counts, strict=True):
            assert shard.shape[dim] == count, f"a shard of {shard.shape[dim]} rows where {count} belong"
        parts = []
        for shard, own in zip(shards, self.runs, strict=True):
            row = 0
            for start, stop in own:
                parts.append((start, shard.narrow(dim, row, stop - start)))
                row += stop - start
        parts.sort(key=lambda part: part[0])
        return torch.cat([part for _, part in parts] or [shards[0]], dim)

    def __add__(self, later: Layout) -> Layout:
        """Return the layout of a context and of a chunk that follows it."""
        assert self.ranks == later.ranks and (self.stop == later.first or not sum(later.counts)), "no chunk between"
        return _layout([(*own, *new) for own, new in zip(self.runs, later.runs, strict=True)])

    @functools.cached_property
    def _index(self) -> tuple[tuple[list[int], list[int]], ...]:
        """First positions of each rank's runs, and the rows in which they begin."""
        found = []
        for own in self.runs:
            rows = [0]
            for start, stop in own:
                rows.append(rows[-1] + stop - start)
            found.append(([start for start, _ in own], rows[:-1]))
        return tuple(found)


def zigzag(length: int, ranks: int, first: int = 0) -> Layout:
    """Return the order in which causal attention is balanced, for `length` positions from `first` on."""
    edges = _edges(length, 2 * ranks, first)
    runs = list(itertools.pairwise(edges))
    return _layout([(runs[rank], runs[2 * ranks - 1 - rank]) for rank in range(ranks)])


def contiguous(length: int, ranks: int, first: int = 0, multiple: int = 1) -> Layout:
    """Return one run a rank; runs end at multiples of `multiple` positions from `first` (pages, say)."""
    edges = [min(edge * multiple + first, first + length) for edge in _edges(-(-length // multiple), ranks, 0)]
    return _layout([(run,) for run in itertools.pairwise(edges)])


def interleaved(length: int, ranks: int, first: int = 0, block: int = 64) -> Layout:
    """Return blocks dealt out in turn: position p is rank `p // block % ranks`'s, however long the context becomes."""
    own: list[list[Run]] = [[] for _ in range(ranks)]
    stop = first + length
    for number in range(first // block, -(-stop // block)):
        own[number % ranks].append((max(first, number * block), min(stop, (number + 1) * block)))
    return _layout(own)


def held_by(rank: int, length: int, ranks: int, first: int = 0) -> Layout:
    """Return positions that one rank holds alone: a question and its answer, say, behind a context of all."""
    return _layout([((first, first + length),) if each == rank else () for each in range(ranks)])


def _edges(length: int, parts: int, first: int) -> list[int]:
    """Return where `parts` runs of nearly one length begin, and where the last ends."""
    if length < 0 or parts < 1:
        raise UsageError(f"{length} positions can't be laid over {parts} parts: give at least 0 and 1")
    return [first + part * length // parts for part in range(parts + 1)]


def _layout(runs: Sequence[Sequence[Run]]) -> Layout:
    """Return a layout without empty runs, and with runs that follow each other as one."""
    joined: list[tuple[Run, ...]] = []
    for own in runs:
        kept: list[Run] = []
        for start, stop in own:
            if stop <= start:
                continue
            if kept and kept[-1][1] == start:
                kept[-1] = (kept[-1][0], stop)
            else:
                kept.append((start, stop))
        joined.append(tuple(kept))
    return Layout(tuple(joined))
