"""What mechanisms have in common that keep every key and choose which blocks a query reads.

A query at t reads its window (the newest `window` keys, back to the start of a block), the blocks of the first `sinks`
keys, and the best of the blocks between: one softmax over all of them, each key once. Together they are at most
`budget` keys, but at least one block is always chosen. A subclass says how a block scores. Who chooses is an option:

- `who="head"`: each KV head. Its query heads vote with their shares, a softmax of the scores over the blocks, summed;
  with one query head a KV head that is the order of the scores themselves;
- `who="layer"`: all heads of a layer together, by the same sum;
- `who="model"`: the model's retrieval heads choose pages once a question for all layers (`Hints.chosen_pages`, the best
  first); without a choice only sinks and window are read.

Up to the trained length the first `dense_layers` layers read everything. Beyond it they choose as the others do: the
model knows no positions at which it could read everything. Positions are as `attend_indexed` says.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.dense import Dense
from longspan.attention.indexed import attend_blocks, attend_indexed, true_positions
from longspan.attention.window import attend_window
from longspan.errors import UsageError
from longspan.kv.base import PAGE, LayerKV, MassMeter

WHO = ("head", "layer", "model")


@dataclass(frozen=True)
class Choosing(Mechanism):
    """Reads a window, sinks, and the best blocks between, within a budget of keys."""

    budget: int = 2048
    """Keys that a query reads at most, window and sinks included."""
    window: int = 128
    """Newest keys that a query reads at least, its own included."""
    sinks: int = 4
    """First keys of the context that every query reads (with the rest of their block)."""
    who: str = "head"
    """Who chooses: each KV `head`, the `layer`, or the `model`'s retrieval heads."""
    dense_layers: int = 2
    """First layers that read everything, up to the trained length."""

    tile: ClassVar[int] = 128
    gpu_tile: ClassVar[int] = 128
    scored: ClassVar[int] = 1
    """Summaries of a block that its score reads."""

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("budget", self.budget, PAGE)
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)
        at_least("dense_layers", self.dense_layers, 0)
        one_of("who", self.who, WHO)
        if self.budget < self.window + self.sinks:
            raise UsageError(
                f"budget={self.budget} is too small: window={self.window} and sinks={self.sinks} "
                f"need {self.window + self.sinks}"
            )

    @abstractmethod
    def scores(self, q: Tensor, kv: LayerKV, first: int, blocks: int, scale: float) -> Tensor:
        """Return the score `[B, Hq, T, P]` of the first P blocks of the context for queries `[B, Hq, T, D]`.

        Queries are unrotated, of the positions `first .. first + T - 1`, on one side of the trained length. Scores are
        in the units of attention scores (scaled), so that their softmax over blocks is a share of mass.
        """

    @property
    def blocks_read(self) -> int:
        """Blocks that a query reads beside its window, those of the sinks included."""
        return max(self._sink_blocks + 1, (self.budget - self.window - self.block + 1) // self.block)

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        count = q.shape[2]
        true = true_positions(kv, first, count)
        if true and hints.layer < self.dense_layers:
            return Dense().attend_tile(q, kv, first, scale, hints)
        chosen = self.choose(q, kv, first, scale, hints)
        if count == 1 and chosen is not None and kv.mass is not None:
            self._measure(kv.mass, first, *chosen)
        if count == 1 and chosen is not None and chosen[1] is None:
            start = max(0, first - self.window + 1) // self.block * self.block
            return attend_blocks(q, kv, first, start, chosen[0][:, :, 0], self.block, scale)
        windows = torch.arange(first + 1, first + 1 + count) - self.window_starts(first, count)
        if chosen is None:
            return attend_window(q, kv, first, windows, scale)[0]
        index, valid = tokens_of_blocks(*chosen, self.block)
        return attend_indexed(q, kv, first, windows, index, valid, scale, near=True)[0]

    def _measure(self, mass: MassMeter, first: int, blocks: Tensor, valid: Tensor | None) -> None:
        """Count what a step of decode chose, all alike: scores of bounds are no shares of attention."""
        read = blocks if valid is None else blocks[valid]
        mass.step(-(-int(self.window_starts(first, 1)) // PAGE))
        share = 1 / max(1, read.numel())
        mass.add(0, read * self.block // PAGE, torch.full_like(read, share, dtype=torch.float))

    def window_starts(self, first: int, count: int) -> Tensor:
        """Return the first key of the window of each of `count` queries, int64 `[count]`: the start of a block."""
        oldest = (max(0, t - self.window + 1) for t in range(first, first + count))
        return torch.tensor([token // self.block * self.block for token in oldest])

    def choose(
        self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints
    ) -> tuple[Tensor, Tensor | None] | None:
        """Choose blocks for each query of a tile.

        Returns:
            `(blocks int64, valid bool)`, each `[B or 1, Hkv or 1, T, k]`, ascending, what is not valid first (and 0);
            `valid` None: all are. None where no query of the tile has a block before its window.
        """
        if torch.is_grad_enabled():  # no choice has a gradient
            with torch.no_grad():
                return self.choose(q, kv, first, scale, hints)
        count = q.shape[2]
        fewest, blocks = (max(0, t - self.window + 1) // self.block for t in (first, first + count - 1))
        if blocks == 0:
            return None
        if self.who == "model":
            return self._by_pages(hints.chosen_pages, q, first, blocks)
        hidden = None  # [T, P], or None where every query may choose every block
        if fewest < blocks:
            starts = self.window_starts(first, count).to(q.device)
            hidden = torch.arange(0, blocks * self.block, self.block, device=q.device) >= starts.unsqueeze(1)
        readable = kv.readable()
        if readable is not None:
            lost = ~readable.to(q.device).repeat_interleave(PAGE // self.block)[:blocks]
            hidden = lost.expand(count, -1) if hidden is None else hidden | lost
        votes = self._votes(self.scores(q, kv, first, blocks, scale), kv.kv_heads, hidden)
        read = min(blocks, self.blocks_read)
        found = torch.topk(votes, read, dim=-1, sorted=False)
        if readable is None and fewest >= read:
            return found.indices.sort(-1).values, None
        # NaN is no reason to leave a block out: a query that reads NaN must say so.
        chosen = found.indices.masked_fill(found.values == float("-inf"), -1).sort(-1).values
        return chosen.clamp(min=0), chosen >= 0

    def _votes(self, scores: Tensor, kv_heads: int, hidden: Tensor | None) -> Tensor:
        """Return the votes `[B, Hkv or 1, T, P]` of scores `[B, Hq, T, P]`; sinks are voted for by everyone."""
        groups = kv_heads if self.who == "head" else 1
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        votes = scores
        if scores.shape[1] > groups:
            # Float64, because shares that are too small for their type would tie with one another.
            shares = torch.softmax(scores, -1, dtype=torch.float64)
            votes = shares.view(shares.shape[0], groups, -1, *shares.shape[2:]).sum(2)
        votes[..., : self._sink_blocks] = float("inf")
        return votes if hidden is None else votes.masked_fill(hidden, float("-inf"))

    def _by_pages(
        self, pages: tuple[int, ...], q: Tensor, first: int, blocks: int
    ) -> tuple[Tensor, Tensor | None] | None:
        """Return the blocks of sinks and chosen pages that lie before each query's window, as `choose` does."""
        each = PAGE // self.block
        ranked = [*range(self._sink_blocks), *(page * each + i for page in pages for i in range(each))]
        ranked = [block for block in dict.fromkeys(ranked) if 0 <= block < blocks]
        if not ranked:
            return None
        if q.shape[2] == 1:
            return torch.tensor(sorted(ranked[: self.blocks_read]), device=q.device).view(1, 1, 1, -1), None
        order = torch.tensor(ranked)
        seen = order * self.block < self.window_starts(first, q.shape[2]).unsqueeze(1)  # [T, R]
        chosen = torch.where(seen & (seen.cumsum(1) <= self.blocks_read), order, -1).sort(-1).values
        chosen = chosen[:, -self.blocks_read :].to(q.device).view(1, 1, q.shape[2], -1)
        return chosen.clamp(min=0), chosen >= 0

    @property
    def wanted_pages(self) -> int:
        """See `Mechanism.wanted_pages`: as many as the budget holds beside window and sinks."""
        return -(-(self.blocks_read - self._sink_blocks) * self.block // PAGE) if self.who == "model" else 0

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`; the window takes at most a quarter, and sinks at most a sixteenth."""
        at_least("budget", keys, PAGE)
        return replace(self, budget=keys, window=min(self.window, keys // 4), sinks=min(self.sinks, keys // 16))

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; for a layer that chooses, with every key of every block that may be read."""
        most = self.window + self.block - 1 + self.blocks_read * self.block
        keys = min(n, most)
        summaries = 0.0 if self.who == "model" else max(0, n - self.window) // self.block * self._scored(shape)
        search = 2.0 * shape.query_heads * summaries * shape.head_dim
        vector = shape.kv_heads * shape.head_dim * shape.summary_bytes
        # The query at t reads min(t + 1, most) keys, and scores about t / n of the summaries.
        read = keys * (keys + 1) / 2 + (n - keys) * most
        return Cost(
            decode_flops=shape.read_flops(keys) + search,
            decode_bytes=keys * shape.token_bytes + summaries * vector,
            prefill_flops=shape.read_flops(read) + search * max(0, n - self.window) / 2,
            kept_bytes=n * shape.token_bytes + n // self.block * vector * len(self.summaries),
            decode_keys=keys + summaries,
        )

    def _scored(self, shape: Shape) -> float:
        """Return the vectors of a head's size that scoring a block in decode reads."""
        return self.scored

    @property
    def _sink_blocks(self) -> int:
        return -(-self.sinks // self.block)


def tokens_of_blocks(blocks: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """Return the tokens of chosen blocks and their validity: `[..., k]` to `[..., k * size]`."""
    index = (blocks.unsqueeze(-1) * size + torch.arange(size, device=blocks.device)).flatten(-2)
    if valid is None:
        return index, None
    return index, valid.unsqueeze(-1).expand(*valid.shape, size).flatten(-2)
