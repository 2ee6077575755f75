"""The descent of a query through the tree of pages, and what the nodes that it does not open stand for.

A node of level l is 16^l neighbouring pages of 64 tokens, all of them complete; page nodes are level 0. A query that
has P pages before its window sees the forest that is P written in base 16: at level l the roots are the nodes
`16 floor(P / 16^(l+1)) .. floor(P / 16^l) - 1`, at most 15. P depends on the query's position alone, so the forest does
not change with chunks, tiles, or how far the context has grown since.

From the highest level down, the candidates of a level are its roots and the children of what was opened one level
above; the best `beam` of them are opened (at level 0: the best `leaves` are read exactly), every other one stands for
its tokens. Only candidates' summaries are touched: at most `15 + 16 beam` a level.

It does not read keys or values of tokens, and knows no window and no positions: the caller places the queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.kv.base import PAGE, LayerKV

FANOUT = 16
"""Children of a node."""

_CHOSEN = 1e9
"""A vote above every share (those are at most the logarithm of the number of heads) and below a sink's."""


@dataclass(frozen=True)
class Plan:
    """How to descend: the options of `tree.Tree`, and what one call adds to them."""

    beam: int
    leaves: int
    sink_pages: int
    who: str
    open_by: str
    coarse: bool
    rotated: bool
    """Whether summaries are of keys rotated to their own positions."""
    scale: float
    chosen: tuple[int, ...] = ()
    """Pages that were chosen elsewhere, best first (`who="model"`)."""


@dataclass(frozen=True)
class Level:
    """The candidates of one level, newest first, for queries `[B, Hkv, T]` (G query heads a KV head, C candidates)."""

    level: int
    nodes: Tensor
    """int64 `[B, Hkv, T, C]`; what is not valid may be any node."""
    logits: Tensor
    """`[B, Hkv, T, G, C]`: `log(count) + q . mean_key * scale` of a node that stands for its tokens, else -inf."""
    values: Tensor
    """Mean values `[B, Hkv, T, C, Dv]`, 0 where a node does not stand for its tokens."""


@dataclass(frozen=True)
class Descent:
    """Where a descent ended."""

    pages: Tensor
    """int64 `[B, Hkv, T, k]`: pages to be read exactly, ascending, what is not valid first."""
    valid: Tensor | None
    """bool `[B, Hkv, T, k]`; None: all are."""
    levels: tuple[Level, ...]
    """Those with coarse nodes, highest first."""

    def attend(self) -> tuple[Tensor, Tensor]:
        """Attend to the nodes that stand for their tokens (there are `levels`).

        Returns:
            `(out [B, Hq, T, Dv], lse [B, Hq, T])`; 0 and -inf for a query that has no such node.
        """
        logits, values = self.levels[0].logits, self.levels[0].values
        if len(self.levels) > 1:
            logits = torch.cat([level.logits for level in self.levels], -1)
            values = torch.cat([level.values for level in self.levels], -2)
        lse = torch.logsumexp(logits, -1)  # [B, Hkv, T, G]
        # A query without such a node has lse -inf: subtracting it would give NaN.
        weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        return (weights @ values).transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


class Split(Protocol):
    """Nodes whose summaries lie on several ranks."""

    def place(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Return where the summaries of nodes of a level lie in `LayerKV.summary`, and which nodes are this rank's."""
        ...

    def whole(self, scores: Tensor, own: Tensor) -> Tensor:
        """Return the scores `[B, Hkv, T, G, C]` of all ranks' nodes from those of this rank's (`own`)."""
        ...


def descend(q: Tensor, kv: LayerKV, old: Tensor, plan: Plan, split: Split | None = None) -> Descent:
    """Descend for every query of a tile.

    Args:
        q: queries `[B, Hq, T, D]`, placed at the position that summaries are read from.
        kv: the layer.
        old: int64 `[T]` on the CPU, pages before each query's window; at least one query has some.
        plan: how.
        split: of nodes over ranks; then only this rank's stand for their tokens, and what is opened is the same on all.
    """
    batch, heads, count, dim = q.shape
    kv_heads = kv.kv_heads
    grouped = q.view(batch, kv_heads, heads // kv_heads, count, dim).transpose(2, 3)  # [B, Hkv, T, G, D]
    readable = kv.readable()
    # Pages that were chosen elsewhere, and pages that can't be read, are no reason to read others instead.
    free = readable is None and plan.who != "model"
    opened, good = q.new_empty(batch, kv_heads, count, 0, dtype=torch.int64), None
    levels = []
    for level in range(highest_level(int(old.max())), -1, -1):
        nodes, valid = _candidates(old, level, opened, good)
        opens = plan.beam if level else plan.leaves
        if nodes.shape[-1] <= opens and (level or free):
            # Every candidate is opened, so none is looked at.
            opened, good = nodes, valid
            continue
        block = PAGE * FANOUT**level
        at, own = (nodes, None) if split is None else split.place(nodes, level)
        picked = _Picked(at)
        keys = picked.take(kv.summary("mean_key_rotated" if plan.rotated else "mean_key", block), q.dtype)
        scores = (grouped * plan.scale) @ keys.mT  # [B, Hkv, T, G, C]
        judged = scores if plan.open_by == "mean" else _bounds(grouped, kv, picked, block, plan)
        if split is not None and own is not None and level == 0:
            judged = split.whole(judged, own)
        votes = _votes(judged, valid, plan)
        votes = _wanted(votes, nodes, level, plan)
        if valid is not None:
            votes = votes.masked_fill(~valid, float("-inf"))
        if level == 0 and readable is not None:
            votes = votes.masked_fill(~readable.to(q.device)[nodes], float("-inf"))
        opened, good, stays = _best(votes.expand(nodes.shape), nodes, valid, opens, free or level > 0)
        if plan.coarse:
            stays = stays if own is None else stays & own
            logits = (scores + math.log(block)).masked_fill(~stays.unsqueeze(-2), float("-inf"))
            # Weights of 0 would let NaN through.
            values = picked.take(kv.summary("mean_value", block), q.dtype).masked_fill(~stays.unsqueeze(-1), 0.0)
            levels.append(Level(level, nodes, logits, values))
    return Descent(opened.flip(-1), None if good is None else good.flip(-1), tuple(levels))


def highest_level(pages: int) -> int:
    """Return the level of the highest roots of a forest over this many pages (at least 1)."""
    level = 0
    while pages >= FANOUT ** (level + 1):
        level += 1
    return level


def nodes_touched(old: int, beam: int, leaves: int) -> int:
    """Return how many nodes a query with `old` pages before its window looks at (none on levels opened whole)."""
    total = opened = 0
    for level in range(highest_level(old), -1, -1) if old else ():
        count = old // FANOUT**level % FANOUT + FANOUT * opened
        opened = min(beam if level else leaves, count)
        total += count if count > opened else 0
    return total


def _candidates(old: Tensor, level: int, opened: Tensor, good: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the candidates of a level `[B, Hkv, T, C]`, newest first, and which are valid (None: all).

    Args:
        old: as in `descend`.
        level: of the candidates.
        opened: int64 `[B, Hkv, T, K]`, nodes of the level above, newest first.
        good: bool, which of them are valid; None: all.
    """
    shape, device = opened.shape[:3], opened.device
    children = (opened.unsqueeze(-1) * FANOUT + torch.arange(FANOUT - 1, -1, -1, device=device)).flatten(-2)
    complete = old // FANOUT**level
    own = complete % FANOUT  # [T], roots of this level
    if good is None and old.numel() == 1:
        if not int(own):
            return children, None
        newest = int(complete) - 1
        roots = torch.arange(newest, newest - int(own), -1, device=device).expand(*shape, -1)
        return torch.cat([roots, children], -1), None
    slots = torch.arange(int(own.max()))
    roots = (complete.unsqueeze(1) - 1 - slots).clamp(min=0).to(device).expand(*shape, -1)
    known = (slots < own.unsqueeze(1)).to(device).expand(*shape, -1)
    below = opened.new_ones(opened.shape, dtype=torch.bool) if good is None else good
    return torch.cat([roots, children], -1), torch.cat([known, below.repeat_interleave(FANOUT, -1)], -1)


class _Picked:
    """The nodes of one level, and where their rows lie in summaries of one layout (all of a layer's mostly are)."""

    def __init__(self, nodes: Tensor) -> None:
        """Take int64 `[B, Hkv, T, C]`."""
        self.nodes = nodes
        self._rows: dict[tuple[int, int], Tensor] = {}

    def take(self, summary: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the summaries `[B, Hkv, T, C, D]` of the nodes from `[B, Hkv, M, D]`."""
        batch, heads, held, dim = summary.shape
        across = summary.stride(0) if batch > 1 else 0, summary.stride(1) if heads > 1 else 0
        if summary.stride()[2:] == (dim, 1) and not any(stride % dim for stride in across):
            # Rows of one stretch of memory, gaps between heads included: several times faster on a CPU than `gather`,
            # which goes number by number.
            apart = across[0] // dim, across[1] // dim
            rows = summary.as_strided((apart[0] * (batch - 1) + apart[1] * (heads - 1) + held, dim), (dim, 1))
            taken = rows.index_select(0, self._flat(apart).to(summary.device))
        else:
            index = self.nodes.to(summary.device).flatten(2).unsqueeze(-1)
            taken = summary.gather(2, index.expand(-1, -1, -1, dim))
        return taken.view(*self.nodes.shape, dim).to(self.nodes.device, dtype)

    def _flat(self, apart: tuple[int, int]) -> Tensor:
        if apart not in self._rows:
            b, h = (torch.arange(count, device=self.nodes.device) for count in self.nodes.shape[:2])
            self._rows[apart] = (self.nodes + b.view(-1, 1, 1, 1) * apart[0] + h.view(-1, 1, 1) * apart[1]).flatten()
        return self._rows[apart]


def _bounds(q: Tensor, kv: LayerKV, picked: _Picked, block: int, plan: Plan) -> Tensor:
    """Return the greatest score that any key of a node could have, `[B, Hkv, T, G, C]` (Quest, equation 2)."""
    suffix = "_rotated" if plan.rotated else ""
    lowest, highest = (picked.take(kv.summary(what + suffix, block), q.dtype) for what in ("lowest", "highest"))
    return (q.clamp(min=0) @ highest.mT + q.clamp(max=0) @ lowest.mT) * plan.scale


def _votes(scores: Tensor, valid: Tensor | None, plan: Plan) -> Tensor:
    """Return the votes `[B, Hkv, T, C]` (`[B, 1, T, C]`: one for all KV heads) of scores `[B, Hkv, T, G, C]`."""
    if scores.shape[-2] == 1 and plan.who != "layer":
        return scores.squeeze(-2)
    if valid is not None:
        scores = scores.masked_fill(~valid.unsqueeze(-2), float("-inf"))
    # All candidates of a level count as many tokens, so shares need no count. Float64, because shares that are too
    # small for their type would tie with one another.
    shares = torch.softmax(scores, -1, dtype=torch.float64).sum(-2)
    return shares.sum(1, keepdim=True) if plan.who == "layer" else shares


def _wanted(votes: Tensor, nodes: Tensor, level: int, plan: Plan) -> Tensor:
    """Put what must be opened above all votes: sinks, and below them pages chosen elsewhere, by their order."""
    size = FANOUT**level
    if plan.who == "model":
        if level == 0:
            votes = torch.full_like(votes, float("-inf"))
        for rank, page in reversed(list(enumerate(plan.chosen))):
            votes = votes.masked_fill(nodes == page // size, _CHOSEN - rank)
    if plan.sink_pages:
        votes = votes.masked_fill(nodes < -(-plan.sink_pages // size), float("inf"))
    return votes


def _best(
    votes: Tensor, nodes: Tensor, valid: Tensor | None, opens: int, free: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Choose among candidates.

    Args:
        votes: `[B, Hkv, T, C]`, -inf where a candidate can't be opened.
        nodes: the candidates, newest first.
        valid: which of them are there; None: all.
        opens: how many are opened at most; ties go to the newer.
        free: whether all that are there can be opened.

    Returns:
        `(opened [B, Hkv, T, k], good, stays [B, Hkv, T, C])`: the best nodes, newest first; which of them are there
        (None: all), what is not comes last; and which candidates stand for their tokens.
    """
    best, order = torch.sort(votes, dim=-1, descending=True, stable=True)
    best, order = best[..., :opens], order[..., :opens]
    stays = torch.ones_like(votes, dtype=torch.bool) if valid is None else valid
    if valid is None and free:
        places, good = order.sort(-1).values, None
        return nodes.gather(-1, places), good, stays.scatter(-1, order, False)
    # NaN is no reason to leave a node out: a query that reads NaN must say so.
    good = best != float("-inf")
    stays = stays.scatter(-1, order, stays.gather(-1, order) & ~good)
    # Candidates are newest first, so sorted places are newest first too.
    places = order.masked_fill(~good, votes.shape[-1]).sort(-1).values
    good = places < votes.shape[-1]
    return nodes.gather(-1, places.clamp(max=votes.shape[-1] - 1)), good, stays
