"""Where the rows of one stream lie in a journal: arrays, since a session of a million tokens has millions of rows.

It knows no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longspan.sessions.records import RowsMeta

_Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Places:
    """Rows `numbers` of a stream: each lies in a segment, so many bytes from an offset on, with a checksum."""

    numbers: _Numbers
    segments: _Numbers
    offsets: _Numbers
    sizes: _Numbers
    checksums: NDArray[np.uint64]

    @classmethod
    def of(cls, records: Sequence[tuple[int, int, RowsMeta]]) -> Places:
        """Return the newest of each row, by ascending number.

        Args:
            records: oldest first: the segment of each, where its data begins, and what it says.
        """
        sizes = [np.array(rows.sizes, np.int64) for _, _, rows in records]
        every = [
            _joined([np.array(rows.numbers, np.int64) for _, _, rows in records]),
            _joined([np.full(len(rows.numbers), segment, np.int64) for segment, _, rows in records]),
            _joined([at + np.cumsum(size) - size for (_, at, _), size in zip(records, sizes, strict=True)]),
            _joined(sizes),
        ]
        sums = np.array([each for _, _, rows in records for each in rows.checksums], np.uint64)
        # Of equal numbers the first found is the last that was written.
        newest = len(sums) - 1 - np.unique(every[0][::-1], return_index=True)[1]
        numbers, segments, offsets, held = (each[newest] for each in every)
        return cls(numbers, segments, offsets, held, sums[newest])

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(self.sizes.sum())

    def find(self, numbers: Sequence[int]) -> Places:
        """Return the places of these rows (KeyError: the first that is not there)."""
        wanted = np.array(numbers, np.int64)
        at = np.searchsorted(self.numbers, wanted)
        there = at < len(self.numbers)
        there[there] = self.numbers[at[there]] == wanted[there]
        if not there.all():
            raise KeyError(int(wanted[~there][0]))
        return self.part(at)

    def part(self, which: slice | NDArray[np.int64]) -> Places:
        """Return some of these places."""
        return Places(
            self.numbers[which], self.segments[which], self.offsets[which], self.sizes[which], self.checksums[which]
        )

    def runs(self, most: int) -> Iterator[slice]:
        """Yield stretches of rows that lie one after the other in a file, of at most so many bytes or one row."""
        ends = self.offsets + self.sizes
        breaks = (self.segments[1:] != self.segments[:-1]) | (self.offsets[1:] != ends[:-1])
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self)]
        for at, stop in itertools.pairwise(edges):
            first = at
            while first < stop:
                reach = int(np.searchsorted(ends[first:stop], self.offsets[first] + most, side="right"))
                last = first + max(1, reach)
                yield slice(first, last)
                first = last

    def told(self) -> dict[int, tuple[int, int]]:
        """Return size and checksum of each row, by number."""
        return dict(
            zip(self.numbers.tolist(), zip(self.sizes.tolist(), self.checksums.tolist(), strict=True), strict=True)
        )


def _joined(parts: list[_Numbers]) -> _Numbers:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
