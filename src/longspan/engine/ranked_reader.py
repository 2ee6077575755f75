"""What happens in every layer while tokens run through the model on several ranks.

Keys and values of new tokens go to the pages of the ranks that hold them, and queries attend over all ranks: those of
tokens that every rank runs, or of a chunk of which each rank runs a part. Then either queries go to the keys
(`attention/sharded.py`, for every mechanism that is sharded), or keys to the queries (for dense attention while the
context is not much longer than the chunk): they go round (`distributed/ring.py`) or are gathered
(`distributed/context_parallel.py`). It does not know when tokens are read or taken back: contexts do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism
from longspan.attention.sharded import attend
from longspan.distributed.context_parallel import gather_attention
from longspan.distributed.group import Group
from longspan.distributed.layer import ShardKV
from longspan.distributed.layout import Layout
from longspan.distributed.ring import ring_attention
from longspan.hf.trained import Trained

_BRING: dict[str, Callable[..., Tensor]] = {"ring": ring_attention, "context_parallel": gather_attention}
"""By the names of `engine.ranks.PLACEMENTS`."""


class Over:
    """A reader that appends to every layer's pages, on the ranks that hold them, and attends over all ranks."""

    def __init__(
        self,
        parts: Sequence[ShardKV],
        mechanism: Mechanism,
        hints: Hints,
        trained: Trained,
        group: Group,
        first: int,
        chunk: Layout | None = None,
        brings: str | None = None,
    ) -> None:
        """Take what is read and by whom.

        Args:
            parts: every layer's, on this rank.
            mechanism: by what queries attend.
            hints: what the mechanism is told at every layer.
            trained: the mechanism that the model was trained with.
            group: the ranks.
            first: position of the first token.
            chunk: which positions each rank runs; None: each runs all.
            brings: how keys go to the queries instead (dense attention, with a chunk): one of `_BRING`.
        """
        self.parts, self.mechanism, self.hints, self.trained = parts, mechanism, hints, trained
        self.group, self.first, self.chunk = group, first, chunk
        self.bring = None if brings is None or chunk is None else _BRING[brings]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`; q, k and v are of the tokens that this rank runs."""
        part, out = self.parts[layer], None
        if self.chunk is not None:
            if self.bring is not None:
                out = self._brought(part, self.chunk, self.bring, q, k, v, scale)
            else:
                q = _whole(q, self.chunk, self.group)
            k, v = (_whole(x, self.chunk, self.group) for x in (k, v))
        part.append(k, v)
        if out is not None:
            return out
        routing = self.trained.route(layer, q) if self.mechanism.routes else None
        hints = Hints(routing, self.hints.chosen_pages, layer, self.trained.layer(layer))
        split = None if self.chunk is None else self.chunk.counts
        return attend(self.mechanism, q, part.rows, self.group, first=self.first, scale=scale, hints=hints, split=split)

    def _brought(
        self, part: ShardKV, chunk: Layout, bring: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        """Attend to keys that come: those of the chunk from where they were computed, older ones from pages."""
        rows, held = part.rows, part.shards.count(self.first)
        if rows.rotary is not None:
            at = chunk.positions(self.group.rank)
            q, k = rows.rotary(q, at), rows.rotary(k, at)
        keys = torch.cat([rows.keys_at_own_positions(0, held), k.to(part.pool.dtype)], 2)
        values = torch.cat([rows.values(0, held), v.to(part.pool.dtype)], 2)
        past = tuple(part.shards.of(rank).count(self.first) for rank in range(self.group.size))
        return bring(self.group, q, keys, values, chunk, _behind(past, chunk), scale=scale)


@functools.lru_cache(maxsize=8)
def _behind(counts: tuple[int, ...], chunk: Layout) -> Layout:
    """Return the layout of a chunk's keys behind older ones, of which each rank holds so many.

    Every query of the chunk sees all older keys, so that it does not matter which of them a rank holds.
    """
    runs, start = [], 0
    for count, own in zip(counts, chunk.runs, strict=True):
        runs.append((*([(start, start + count)] if count else []), *own))
        start += count
    return Layout(tuple(runs))


def _whole(x: Tensor, chunk: Layout, group: Group) -> Tensor:
    """Return the rows of all ranks, `[1, H, T, D]`, from those that this rank runs."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, max(chunk.counts) - x.shape[2]))
    every = group.gather(padded)
    return chunk.whole([each[:, :, :count] for each, count in zip(every, chunk.counts, strict=True)])
