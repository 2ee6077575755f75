"""The tree over ranks: every rank holds whole subtrees of 16 pages, and what lies above them is known to all.

Tokens are dealt out by 16 pages (1024 tokens), so that a node of level 1 and its pages lie on one rank. Its summaries
are sent to all once, when its last page is full: a few thousandths of the keys' and values' bytes, from which each
rank makes the levels above. A query's descent down to level 1 is then the same on every rank without a word between
them. Of the last level each rank scores the pages that it holds, the scores travel (at most `15 + 16 beam` a query
head), and all choose alike. Each rank reads the chosen pages and the part of the window that it holds, and lets the
nodes of its own stand for their tokens: a page that was not opened on the rank that holds it, a node above on rank
`node % ranks`. One merge gives the softmax over everything, each token once.

What it computes is what `tree.py` says. It does not measure how much attention pages get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention.choosing import tokens_of_blocks
from longspan.attention.indexed import attend_gathered, reads_own_positions
from longspan.attention.sharded import Parts, attend_newest, nothing
from longspan.attention.tree_descent import FANOUT, Descent, descend
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.kernels.partial_attention import merge_partials
from longspan.kv.base import PAGE

if TYPE_CHECKING:
    from longspan.attention.base import Hints
    from longspan.attention.tree import Tree

UNIT = PAGE * FANOUT
"""Tokens that lie on one rank together."""
_GATHERED = 1 << 21
"""Numbers of keys gathered at once."""


def attend_shard(
    mechanism: Tree, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints
) -> Parts:
    """See `Mechanism.attend_shard`."""
    count = q.shape[2]
    own = reads_own_positions(rows, first + count)
    if own and hints.layer < mechanism.dense_layers:
        return Parts.one(*attend_newest(q, rows, first, None, scale))
    starts = mechanism.window_starts(first, count)
    windows = torch.arange(first + 1, first + 1 + count) - starts
    old = starts // PAGE
    near = attend_newest(q, rows, first, windows, scale)
    if int(old[-1]) == 0:
        return Parts.one(*near)
    split = _Split(rows, group)
    placed = rows.queries_from(q, first) if own else rows.queries_at(q, windows)
    found = descend(placed, split, old, mechanism.plan(rows, own, scale, hints), split)
    parts = [near, _leaves(q, rows, first, windows, found, scale, own)]
    if found.levels:
        parts.append(found.attend())
    return Parts.one(*merge_partials(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])))


def _leaves(
    q: Tensor, rows: ShardRows, first: int, windows: Tensor, found: Descent, scale: float, own: bool
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens of the chosen pages that lie here, at the positions at which one rank would read them."""
    batch, _, count, dim = q.shape
    index, valid = tokens_of_blocks(found.pages, found.valid, PAGE)
    here = rows.shards.owns(index)
    here = here if valid is None else here & valid
    if rows.length == 0 or not bool(here.any()):
        return nothing(q, rows)
    held = _ByToken(rows)
    step = max(1, _GATHERED // max(1, batch * rows.kv_heads * index.shape[-1] * dim))
    parts = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        one = q[:, :, part], held, first + start, windows[part], index[:, :, part], here[:, :, part], scale, own
        parts.append(attend_gathered(*one, near=False, kv_heads=rows.kv_heads))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


class _ByToken(ShardRows):
    """A rank's rows, asked for by token; of a token that lies elsewhere any row."""

    def __init__(self, rows: ShardRows) -> None:
        super().__init__(rows.own, rows.shards, rows.rotary, rows.total, rows.nodes)

    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        return super().gather(self.shards.rows(index).clamp(max=self.length - 1), rotated=rotated)


class _Split(ShardRows):
    """The summaries of pages that lie here and of all nodes above them."""

    def __init__(self, rows: ShardRows, group: Group) -> None:
        super().__init__(rows.own, rows.shards, rows.rotary, rows.total, rows.nodes)
        self.group = group

    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """See `LayerKV`; of pages those of rows, of larger blocks those of all tokens."""
        if block == PAGE:
            held = super().summary(what)
            # A rank without a page is asked for one all the same.
            return held if held.shape[2] else held.new_zeros(*held.shape[:2], 1, held.shape[3])
        return self.nodes.get(what, block, self.own.summary, self.shards, self.total, self.group)

    def place(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """See `tree_descent.Split`."""
        if level:
            return nodes, nodes % self.shards.ranks == self.shards.rank
        own, held = self.shards.owns(nodes * PAGE), max(1, self.length // PAGE)
        return (self.shards.rows(nodes * PAGE) // PAGE).clamp(max=held - 1), own

    def whole(self, scores: Tensor, own: Tensor) -> Tensor:
        """See `tree_descent.Split`."""
        return self.group.reduce(scores.masked_fill(~own.unsqueeze(-2), 0.0))
