"""Which of one rank's queries see which of another's keys: causal attention cut into blocks that kernels compute.

A block is either whole (every query sees every key) or square and causal (query i sees keys 0..i). Runs of both layouts
ascend, so that the keys a query sees are another rank's first rows, and blocks whose queries follow each other are
joined: zigzag order then costs one block a pass, half as large as all pairs. It knows positions, and no tensors.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from longspan.distributed.layout import Layout, Run


@dataclass(frozen=True)
class Block:
    """Rows of queries and rows of keys, and which of these see each other."""

    queries: Run
    keys: Run
    causal: bool
    """Square, and query i sees keys 0..i; False: all see all."""

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key are computed."""
        queries, keys = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        return queries * (queries + 1) // 2 if self.causal else queries * keys


def blocks(queries: Layout, rank: int, keys: Layout, source: int) -> list[Block]:
    """Return the blocks of a rank's queries and the source rank's keys; all pairs that are seen, each once."""
    pieces: list[_Piece] = []
    row = 0
    for start, stop in queries.runs[rank]:
        for first, last in _cut(start, stop, keys.runs[source]):
            new = _Piece(row, row + last - first, keys.before(source, first), keys.before(source, last))
            row = new.stop
            joined = pieces[-1].joined(new) if pieces else None
            pieces[-1:] = [joined] if joined else [*pieces[-1:], new]
    return [block for piece in pieces for block in piece.blocks()]


@dataclass(frozen=True)
class _Piece:
    """Queries that all see the first `seen` keys, and each its own and those before it of `seen .. end - 1`."""

    start: int
    stop: int
    seen: int
    end: int

    def joined(self, later: _Piece) -> _Piece | None:
        """Return this piece and the one that follows it as one, None where they are not."""
        if self.end == later.seen and (self.end > self.seen) == (later.end > later.seen):
            return _Piece(self.start, later.stop, self.seen, later.end)
        return None

    def blocks(self) -> list[Block]:
        """Return it as blocks that a kernel computes."""
        rows = (self.start, self.stop)
        if self.stop - self.start == 1:
            return [Block(rows, (0, self.end), causal=False)] if self.end else []
        whole = [Block(rows, (0, self.seen), causal=False)] if self.seen else []
        return whole + ([Block(rows, (self.seen, self.end), causal=True)] if self.end > self.seen else [])


def _cut(start: int, stop: int, runs: tuple[Run, ...]) -> list[Run]:
    """Return the parts of a run of queries within which keys are all there or all not."""
    edges = {start, stop}
    for run in runs:
        edges.update(edge for edge in run if start < edge < stop)
    return list(itertools.pairwise(sorted(edges)))
