"""Attention over ranks that each hold a part of a context's keys and values.

Queries go to the keys: every rank attends from the same queries to its own rows, and what travels is of a size that the
context does not change: queries, scores of what was found in a search, and outputs with their log-sum-exps, which are
merged in float32 (`kernels/partial_attention`). Tokens are dealt out in turn (`distributed/shards.py`), so that ranks
have equal work.

A mechanism says what one rank reads (`Mechanism.attend_shard`); here is the plumbing that all of them share. It does
not know pages, models or how ranks talk to each other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.distributed.group import Group
from longspan.distributed.merge import merge_packed
from longspan.distributed.shards import ShardRows
from longspan.kernels.partial_attention import merge_partials, partial_attention

if TYPE_CHECKING:
    from longspan.attention.base import Hints, Mechanism


@dataclass(frozen=True)
class Parts:
    """What one rank's rows add to the outputs of queries `[B, Hq, T]`."""

    outs: Tensor
    """`[J, B, Hq, T, Dv]`: J softmaxes that are merged over ranks each for itself."""
    lses: Tensor
    """`[J, B, Hq, T]`; -inf where no key was read here."""
    weights: Tensor | None = None
    """`[J, B, Hq, T]`, the same on every rank: by what merged softmaxes are summed; None: there is one."""

    @classmethod
    def one(cls, out: Tensor, lse: Tensor) -> Parts:
        """Return the parts of mechanisms with one softmax: out `[B, Hq, T, Dv]`, lse `[B, Hq, T]`."""
        return cls(out.unsqueeze(0), lse.unsqueeze(0))


def attend(
    mechanism: Mechanism,
    q: Tensor,
    rows: ShardRows,
    group: Group,
    *,
    first: int,
    scale: float,
    hints: Hints,
    split: Sequence[int] | None = None,
) -> Tensor:
    """Attend causally over all ranks; every rank calls it with the same queries.

    Args:
        mechanism: one that is `sharded`.
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`, whose keys and values are held.
        rows: this rank's.
        group: the ranks.
        first: position of the first query.
        scale: what scores are multiplied by.
        hints: see `Hints`.
        split: of how many neighbouring queries each rank wants the outputs, rank by rank; None: of all.

    Returns:
        `[B, Hq, T, Dv]` in q's type, or as many as were wanted here. Computed in float32 (float64 where q is).
    """
    count = q.shape[2]
    computed = q.to(torch.promote_types(q.dtype, torch.float32))
    tile = mechanism.gpu_tile if q.is_cuda else mechanism.tile
    edges = {*range(0, count, tile), count}
    trained = None if rows.rotary is None else rows.rotary.trained_length
    if trained is not None and first < trained < first + count:
        edges.add(trained - first)  # see `Mechanism.attend`
    tiles = []
    for start, stop in itertools.pairwise(sorted(edges)):
        routing = hints.routing_query
        part = dataclasses.replace(hints, routing_query=None if routing is None else routing[:, :, start:stop])
        tiles.append(mechanism.attend_shard(computed[:, :, start:stop], rows, group, first + start, scale, part))
    return merge(tiles, group, split).to(q.dtype)


def merge(tiles: Sequence[Parts], group: Group, split: Sequence[int] | None = None) -> Tensor:
    """Merge what the ranks' rows add to neighbouring tiles of queries; arguments and result as in `attend`."""
    most = max(tile.outs.shape[0] for tile in tiles)
    packed = torch.cat([_packed(tile, most) for tile in tiles], 3)  # [J, B, Hq, T, Dv + 1]
    weights = torch.cat([_weights(tile, most) for tile in tiles], 3) if most > 1 else None
    if split is None:
        every = group.gather(packed)
    else:
        # Rows that one rank wants go to it alone.
        sent = [piece.contiguous() for piece in packed.split(list(split), 3)]
        every = torch.stack(group.deal(sent))
        if weights is not None:
            weights = weights.split(list(split), 3)[group.rank]
    out, _ = merge_packed(every)
    return out[0] if weights is None else (weights.unsqueeze(-1) * out).sum(0)


def attend_newest(
    q: Tensor, rows: ShardRows, first: int, window: int | Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the rows among each query's newest tokens.

    Args:
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`.
        rows: this rank's.
        first: position of the first query.
        window: tokens that each query sees, its own included; a tensor `[T]`: each its own number; None: all.
        scale: what scores are multiplied by.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`; 0 and -inf for a query that sees no row here.
    """
    count, shards = q.shape[2], rows.shards
    at = torch.arange(first, first + count)
    oldest = torch.zeros_like(at) if window is None else (at - window + 1).clamp(min=0)
    start, stop = shards.count(int(oldest.min())), shards.count(first + count)
    # Rows from `seen` to `old` are in every query's window, those before and behind in some queries' alone.
    seen, old = shards.count(int(oldest.max())), shards.count(first + 1)
    placed = rows.queries_from(q, first)
    parts = []
    if seen < old:
        parts.append(_read(placed, rows, seen, old, None, scale))
    for begin, end in ((start, seen), (old, stop)) if seen < old else ((start, stop),):
        if begin < end:
            token = shards.tokens(torch.arange(begin, end))
            mask = (token <= at.unsqueeze(1)) & (token >= oldest.unsqueeze(1))
            parts.append(_read(placed, rows, begin, end, mask.to(q.device), scale))
    if not parts:
        return nothing(q, rows)
    if len(parts) == 1:
        return parts[0]
    return merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))


def nothing(q: Tensor, rows: ShardRows) -> tuple[Tensor, Tensor]:
    """Return what a rank adds that holds no row which queries `[B, Hq, T, D]` read."""
    return q.new_zeros(*q.shape[:3], rows.values(0, 0).shape[-1]), q.new_full(q.shape[:3], float("-inf"))


def _read(
    q: Tensor, rows: ShardRows, start: int, stop: int, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    k = rows.keys_at_own_positions(start, stop)
    return partial_attention(q, k, rows.values(start, stop), mask, scale=scale)


def _packed(tile: Parts, most: int) -> Tensor:
    """Return outputs and log-sum-exps of `most` softmaxes in one tensor; a tile with one has it `most` times."""
    packed = torch.cat([tile.outs, tile.lses.unsqueeze(-1).to(tile.outs.dtype)], -1)
    return packed if packed.shape[0] == most else packed.expand(most, *packed.shape[1:])


def _weights(tile: Parts, most: int) -> Tensor:
    if tile.weights is not None:
        return tile.weights
    return torch.full_like(tile.lses, 1.0 / most).expand(most, *tile.lses.shape[1:])
