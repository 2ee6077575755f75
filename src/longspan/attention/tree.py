"""Tree: near tokens exact, the best far pages exact, all other tokens through nodes that stand for them.

Hierarchical KV compression: pages of 64 tokens are the leaves of a tree of fan-out 16, in which a node keeps the mean
key and mean value (and key bounds) of its tokens. A query reads its window, the sinks' pages and the best pages
exactly, and every node that it did not open stands for its tokens with weight `count * exp(q . mean_key * scale)` and
value `mean_value`; all in one softmax. `tree_descent.py` says how it descends. By Jensen's inequality that weight is at
most what the tokens themselves would weigh. Work is O(log n) a query. Bounds are Quest's (arXiv 2406.10774, equation
2), and a mean that stands for a cluster of keys, weighed by its count, is that of Multipole Attention (arXiv
2506.13059). Here clusters are neighbours in the text, so that nothing is clustered again as the context grows.

Who chooses: each KV `head` by the summed shares of its query heads, the `layer` by those of all, or the `model`: the
pages of `Hints.chosen_pages` are read exactly (the first `leaves` of them, sinks included), the rest stands coarse.

Positions. Up to the length that the model was trained on, leaves, means and bounds are of keys rotated to their own
positions. Beyond it leaves are read as `attend_indexed` reads them, in order directly before the window, and EVERY
coarse node, whichever its age and size, as one unrotated mean key at the one position directly before the window: a
query whose window holds w keys sees it at distance w. Leaves and nodes so overlap in position, which a model does not
mind, and no distance exceeds `window + 63 + 64 leaves`. Nodes are also chosen by the scores that they have there.

A page that can't be read exactly any more (`LayerKV.readable`) is never chosen as a leaf and stands for itself.
Where the layer's KV carries a `mass` (`rebalance.PageMass`), each decode step adds the weights that it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention import tree_sharded
from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.choosing import WHO, tokens_of_blocks
from longspan.attention.dense import Dense
from longspan.attention.indexed import attend_indexed, true_positions
from longspan.attention.sharded import Parts
from longspan.attention.tree_descent import FANOUT, Descent, Plan, descend, nodes_touched
from longspan.attention.window import attend_window
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.errors import UsageError
from longspan.kernels.partial_attention import merge_partials
from longspan.kv.base import PAGE, LayerKV, MassMeter


@dataclass(frozen=True)
class Tree(Mechanism):
    """Reads a window, sinks and the best pages exactly, and everything else through nodes of a tree."""

    beam: int = 16
    """Nodes opened on each level of the tree."""
    leaves: int = 16
    """Pages of 64 tokens read exactly, those of the sinks included."""
    window: int = 128
    """Newest keys that a query reads at least, its own included; it begins at the start of a page."""
    sinks: int = 4
    """First keys of the context that every query reads exactly (with the rest of their page)."""
    who: str = "head"
    """Who chooses: each KV `head`, the `layer`, or the `model`'s retrieval heads."""
    open_by: str = "bounds"
    """What a node is opened by: the weight of its `mean` key, or the greatest its keys' `bounds` allow."""
    coarse: bool = True
    """Whether nodes that were not opened stand for their tokens; false: those tokens are not read."""
    dense_layers: int = 0
    """First layers that read everything, up to the trained length and while all can be read; none, since what is not
    opened still counts."""

    name: ClassVar[str] = "tree"
    about: ClassVar[str] = "near and chosen pages exactly, all else through a tree of means"
    source: ClassVar[str] = "arXiv 2506.13059, 2406.10774"
    decode_order: ClassVar[str] = "log n"
    prefills: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    sharded: ClassVar[bool] = True
    shard_unit: ClassVar[int] = tree_sharded.UNIT
    tile: ClassVar[int] = 16
    gpu_tile: ClassVar[int] = 128

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)
        at_least("dense_layers", self.dense_layers, 0)
        at_least("beam", self.beam, max(1, -(-self._sink_pages // FANOUT)))
        at_least("leaves", self.leaves, max(1, self._sink_pages))
        one_of("who", self.who, WHO)
        one_of("open_by", self.open_by, ("mean", "bounds"))

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        count = q.shape[2]
        true = true_positions(kv, first, count)
        if true and hints.layer < self.dense_layers and kv.readable() is None:
            return Dense().attend_tile(q, kv, first, scale, hints)
        starts = self.window_starts(first, count)
        windows = torch.arange(first + 1, first + 1 + count) - starts
        old = starts // PAGE
        if int(old[-1]) == 0:
            return attend_window(q, kv, first, windows, scale)[0]
        placed = kv.queries_from(q, first) if true else kv.queries_at(q, windows)
        found = descend(placed, kv, old, self.plan(kv, true > 0, scale, hints))
        pages = found.pages
        if found.valid is not None:
            # What is not valid must still be held: the first page of the query's own window always is.
            pages = torch.where(found.valid, pages, old.to(q.device).view(1, 1, -1, 1))
        index, valid = tokens_of_blocks(pages, found.valid, PAGE)
        out, lse = attend_indexed(q, kv, first, windows, index, valid, scale, near=True)
        if found.levels:
            coarse, coarse_lse = found.attend()
            out, lse = merge_partials(torch.stack([out, coarse]), torch.stack([lse, coarse_lse]))
        if kv.mass is not None and count == 1:
            kv.mass.step(int(old))
            measure(kv.mass, q, kv, first, windows, found, lse, scale)
        return out

    def attend_shard(self, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints) -> Parts:
        """See `Mechanism.attend_shard`."""
        return tree_sharded.attend_shard(self, q, rows, group, first, scale, hints)

    def window_starts(self, first: int, count: int) -> Tensor:
        """Return the first key of the window of each of `count` queries, int64 `[count]`: the start of a page."""
        return (torch.arange(first, first + count) - self.window + 1).clamp(min=0) // PAGE * PAGE

    @property
    def summaries(self) -> tuple[str, ...]:
        """See `Mechanism.summaries`; each is read of every block of `64 * 16^level` tokens."""
        bounds = ("lowest", "highest", "lowest_rotated", "highest_rotated") if self.open_by == "bounds" else ()
        return ("mean_key", "mean_key_rotated", "mean_value", *bounds)

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`; after a window of at most a quarter, half goes to leaves, and the rest to nodes."""
        small = replace(self, window=max(1, min(self.window, keys // 4)), sinks=min(self.sinks, PAGE), leaves=1, beam=1)

        def most(made: Callable[[int], Tree], largest: int) -> Tree:
            """Return it with the greatest value of an option that stays within the keys."""
            one = Shape(1, 1, 1, 1)
            for value in range(max(1, largest), 0, -1):
                if made(value).cost(n, one).decode_keys <= keys:
                    return made(value)
            raise UsageError(f"attention {self.name!r} can't read within {keys} of {n} keys: allow 512 or more")

        half = replace(small, leaves=max(1, (keys - small.window - PAGE // 2) // (2 * PAGE)))
        wide = most(lambda beam: replace(half, beam=beam), keys // FANOUT)
        return most(lambda leaves: replace(wide, leaves=leaves), keys // PAGE)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; for a layer that is not dense."""
        before = int(self.window_starts(n - 1, 1)) // PAGE if n > 0 else 0
        exact = n - before * PAGE + min(before, self.leaves) * PAGE
        nodes = nodes_touched(before, self._opens, 0 if self.who == "model" else self.leaves)
        bounds = 2 if self.open_by == "bounds" else 0
        values = shape.value_dim if self.coarse else 0
        node_flops = 2.0 * shape.query_heads * nodes * (shape.head_dim * (1 + bounds) + values)
        node_numbers = shape.head_dim * (1 + bounds) + values
        decode = shape.read_flops(exact) + node_flops
        # Of every page and, a sixteenth each time, of all levels above it; rotated and unrotated.
        kept = n / PAGE * FANOUT / (FANOUT - 1) * (shape.head_dim * 2 * (1 + bounds) + shape.value_dim)
        return Cost(
            decode_flops=decode,
            decode_bytes=exact * shape.token_bytes + nodes * node_numbers * shape.kv_heads * shape.summary_bytes,
            prefill_flops=n * decode,
            kept_bytes=n * shape.token_bytes + kept * shape.kv_heads * shape.summary_bytes,
            decode_keys=float(exact + nodes),
        )

    @property
    def _sink_pages(self) -> int:
        return -(-self.sinks // PAGE)

    @property
    def _opens(self) -> int:
        """Nodes opened a level; pages that the model chose may lie under as many nodes as there are pages."""
        return max(self.beam, self.leaves) if self.who == "model" else self.beam

    def plan(self, kv: LayerKV, own: bool, scale: float, hints: Hints) -> Plan:
        """Return how to descend; `own`: whether keys are read at their own positions."""
        return Plan(
            beam=self._opens,
            leaves=self.leaves,
            sink_pages=self._sink_pages,
            who=self.who,
            open_by=self.open_by,
            coarse=self.coarse,
            rotated=own and kv.rotary is not None,
            scale=scale,
            chosen=hints.chosen_pages if self.who == "model" else (),
        )


@torch.no_grad()
def measure(
    mass: MassMeter, q: Tensor, kv: LayerKV, first: int, windows: Tensor, found: Descent, lse: Tensor, scale: float
) -> None:
    """Add to `mass` what each leaf and each coarse node weighed in a decode step, as the mean over query heads.

    Args:
        mass: of the layer.
        q: the unrotated query `[B, Hq, 1, D]` at the position `first`.
        kv: the layer.
        first: position of the query.
        windows: int64 `[1]`, keys in its window.
        found: what it read beside its window.
        lse: `[B, Hq, 1]`, the log-sum-exp over all that it read.
        scale: what scores are multiplied by.
    """
    batch, kv_heads, _, leaves = found.pages.shape
    share = 1.0 / (batch * q.shape[1])
    every = lse.view(batch, kv_heads, -1, 1)
    for level in found.levels:
        weights = torch.exp(level.logits[:, :, 0] - every)  # [B, Hkv, G, C]
        mass.add(level.level, level.nodes[:, :, 0], weights.sum(2) * share)
    good = torch.ones_like(found.pages, dtype=torch.bool) if found.valid is None else found.valid
    index, _ = tokens_of_blocks(torch.where(good, found.pages, first // PAGE)[:, :, 0], None, PAGE)
    index = index.clamp(max=first)
    true = true_positions(kv, first, 1) > 0
    keys = kv.gather(index, rotated=true)[0].to(q.dtype)
    at = torch.tensor([first])
    if not true and kv.rotary is not None:
        keys = kv.rotary.range(keys, 0)
        at = leaves * PAGE + windows - 1
    placed = kv.queries_at(q, at).view(batch, kv_heads, -1, q.shape[-1])
    weights = torch.exp((placed * scale) @ keys.mT - every).sum(2).unflatten(-1, (leaves, PAGE)).sum(-1)
    mass.add(0, found.pages[:, :, 0], torch.where(good[:, :, 0], weights, 0.0) * share)
