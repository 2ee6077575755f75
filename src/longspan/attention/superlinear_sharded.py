"""Superlinear attention over ranks: each searches its own anchors and reads its own part of what was found.

Of a query's anchors a rank scores those that it holds, O(sqrt(n) / ranks) of them, and sends the `spans` best a query
head, a score and a position each. Every rank sees all of these and takes the same best ones (ties: the newer anchor),
which are the best of all, since none of them can be worse than the `spans`-th of its own rank. Spans and window are
stretches of tokens, so stretches of rows on every rank: each reads what it holds, and outputs are merged. `joint`: one
softmax over the union, each key once; `routed`: one for each span with the window, weighed by the search scores.

A query head's candidates and outputs are all that travels: `ranks * spans` scores and positions and one output
(`routed`: `spans` of them), however long the context is.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention.sharded import Parts, attend_newest
from longspan.attention.spans import attend_spans, disjoint, each_with_window, united
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.kernels.superlinear import offsets

if TYPE_CHECKING:
    from longspan.attention.base import Hints
    from longspan.attention.superlinear import Superlinear


def attend_shard(
    mechanism: Superlinear, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints
) -> Parts:
    """See `Mechanism.attend_shard`."""
    near, near_lse = _near(mechanism, q, rows, first, scale)
    routing = q if hints.routing_query is None else hints.routing_query.to(q.dtype)
    found = find(mechanism, routing, rows, group, first)
    if found is None:
        return Parts.one(near, near_lse)
    scores, lo, hi = found
    some = (lo <= hi).any(-1, keepdim=True)
    shift = mechanism.shifts(rows, first, q.shape[2], hi)
    lo = lo.clamp(min=mechanism.sinks)  # sinks are read already
    if mechanism.gate == "joint":
        lo, hi, shift = disjoint(lo, hi, shift)
    outs, lses = _spans(q, rows, first, lo, hi, shift, scale)
    if mechanism.gate == "joint":
        return Parts.one(*united(near, near_lse, outs, lses))
    each = each_with_window(near, near_lse, outs, lses)
    # A query without any span sums its window's softmax as often as there are spans.
    weights = torch.softmax(torch.where(some, scores, torch.zeros_like(scores)), -1).movedim(-1, 0)
    return Parts(torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each]), weights)


def find(
    mechanism: Superlinear, q: Tensor, rows: ShardRows, group: Group, first: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find the spans of every query of a tile over all ranks; arguments and result as in `Superlinear.search`.

    Lo and hi are tokens, and the same on every rank.
    """
    batch, heads, count, _ = q.shape
    table = offsets(mechanism.power, first + count)
    steps = torch.tensor(table[mechanism.first_anchor - 1 : bisect.bisect_right(table, first + count)])
    if steps.numel() == 0 or mechanism.spans == 0:
        return None
    at = torch.arange(first, first + count).unsqueeze(1)
    anchors = at - steps + 1  # [T, M], newest first
    own = (anchors >= 0) & rows.shards.owns(anchors)
    most = int(own.sum(1).max())
    # Those that lie here first, each still before the older ones.
    order = torch.argsort(~own, dim=1, stable=True)[:, :most]
    anchors, own = anchors.gather(1, order), own.gather(1, order)
    scores = q.new_full((batch, heads, count, mechanism.spans), float("-inf"))
    chosen = torch.zeros(scores.shape, dtype=torch.int64, device=q.device)
    if most:
        here = mechanism.scores_of(q, rows, torch.where(own, rows.shards.rows(anchors), 0))
        here = here.masked_fill(~own.to(q.device), float("-inf"))
        best, which = torch.sort(here, dim=-1, descending=True, stable=True)
        best, which = best[..., : mechanism.spans], which[..., : mechanism.spans]
        scores[..., : best.shape[-1]] = best
        each = anchors.to(q.device).expand(batch, heads, -1, -1).gather(-1, which)
        chosen[..., : best.shape[-1]] = each.clamp(min=0)
    scores, chosen = _best_of_all(scores, chosen, group)
    return mechanism.around(scores, chosen, first)


def _best_of_all(scores: Tensor, chosen: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return the best `[B, Hq, T, S]` of every rank's candidates, the same on all of them: ties go to the newer."""
    # Positions travel as the bits of scores, so that one message holds both.
    bits = torch.int64 if scores.dtype == torch.float64 else torch.int32
    every = group.gather(torch.stack([scores, chosen.to(bits).view(scores.dtype)]))  # [P, 2, B, Hq, T, S]
    all_scores = every[:, 0].movedim(0, -2).flatten(-2)
    all_chosen = every[:, 1].contiguous().view(bits).long().movedim(0, -2).flatten(-2)
    newer = torch.argsort(all_chosen, dim=-1, descending=True, stable=True)
    all_scores, all_chosen = all_scores.gather(-1, newer), all_chosen.gather(-1, newer)
    best, order = torch.sort(all_scores, dim=-1, descending=True, stable=True)
    spans = scores.shape[-1]
    return best[..., :spans], all_chosen.gather(-1, order[..., :spans])


def _near(mechanism: Superlinear, q: Tensor, rows: ShardRows, first: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the rows of the window and, where they are older, of the sinks."""
    near = attend_newest(q, rows, first, mechanism.whole_window, scale)
    count = q.shape[2]
    if not mechanism.sinks or first + count <= mechanism.whole_window:
        return near
    older = torch.arange(first, first + count, device=q.device).view(1, 1, -1, 1) - mechanism.whole_window
    hi = older.clamp(max=mechanism.sinks - 1).expand(q.shape[0], q.shape[1], -1, -1)
    shift = mechanism.shifts(rows, first, count, hi)
    out, lse = _spans(q, rows, first, torch.zeros_like(hi), hi, shift, scale)
    return each_with_window(*near, out, lse)[0]


def _spans(
    q: Tensor, rows: ShardRows, first: int, lo: Tensor, hi: Tensor, shift: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend to the rows of each span of tokens apart, as `attend_spans` does."""
    begin, end = rows.shards.ranges(lo, hi)
    stop = rows.shards.count(first + q.shape[2])
    return attend_spans(q, rows, first, begin, end, shift, scale, stop=stop)
