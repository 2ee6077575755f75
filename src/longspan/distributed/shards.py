"""Which tokens of one context each rank holds, and a rank's own rows as a layer that can be read.

A context grows while it is read and answered from, so tokens are not cut into one stretch a rank but dealt out in
turn, a unit of pages at a time: token t lies on rank `t // unit % ranks`. Whatever a query reads is then spread over
all ranks (a window of 2024 tokens, a span of thousands, anchors whose distance grows), appends go on in turn, and
nothing moves when the context grows or is cut. A stretch of tokens is a stretch of rows on every rank, so that windows
and spans need two numbers there as here.

Rows are in the order of their tokens. It does not know what is read, and sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from longspan.distributed.nodes import Nodes
from longspan.kv.base import PAGE, LayerKV
from longspan.kv.rotary import Rotary


@dataclass(frozen=True)
class Shards:
    """How tokens are dealt out, and one rank's share of them."""

    rank: int
    ranks: int
    unit: int = PAGE
    """Tokens that lie together, a multiple of a page."""

    def of(self, rank: int) -> Shards:
        """Return another rank's share."""
        return replace(self, rank=rank)

    @overload
    def count(self, stop: int) -> int: ...
    @overload
    def count(self, stop: Tensor) -> Tensor: ...
    def count(self, stop: int | Tensor) -> int | Tensor:
        """Return how many of the tokens `0 .. stop - 1` lie here: the row of the first one from `stop` on."""
        cycle = self.unit * self.ranks
        rest = stop % cycle - self.rank * self.unit
        whole = stop // cycle * self.unit
        if isinstance(rest, Tensor):
            return whole + rest.clamp(0, self.unit)
        return whole + min(max(rest, 0), self.unit)

    def tokens(self, rows: Tensor) -> Tensor:
        """Return which token each row is."""
        return (rows // self.unit * self.ranks + self.rank) * self.unit + rows % self.unit

    def owns(self, tokens: Tensor) -> Tensor:
        """Return which tokens lie here, bool."""
        return tokens // self.unit % self.ranks == self.rank

    def rows(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens that lie here."""
        return tokens // (self.unit * self.ranks) * self.unit + tokens % self.unit

    def pages(self, length: int) -> Tensor:
        """Return which pages of a context of `length` tokens lie here, int64, ascending."""
        held = -(-self.count(length) // PAGE)
        return self.tokens(torch.arange(held) * PAGE) // PAGE

    def ranges(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and last row of the stretches of tokens `lo .. hi`; where none lies here, the last is less.

        Args:
            lo: int64, first tokens.
            hi: int64, last tokens; less than `lo`: the stretch is empty.
        """
        first, last = self.count(lo.clamp(min=0)), self.count((hi + 1).clamp(min=0)) - 1
        return first, torch.where(lo <= hi, last, first - 1)


class ShardRotary(Rotary):
    """Rotates rows of one rank: asked for row j it rotates to the position of the token that row j is."""

    def __init__(self, whole: Rotary, shards: Shards) -> None:
        """Take how the model rotates, and which rows there are."""
        super().__init__(whole.inv_freq, whole.trained_length)
        self.shards = shards

    def _angles(self, positions: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return super()._angles(self.shards.tokens(positions), device, dtype)


class ShardRows(LayerKV):
    """One rank's rows of one layer, as mechanisms read them: tokens by row, queries by their position in the context.

    `length`, `keys`, `gather` and so on speak of rows. `rotary` rotates queries to positions of the whole context, keys
    come rotated to their own.
    """

    def __init__(self, own: LayerKV, shards: Shards, rotary: Rotary | None, total: int, nodes: Nodes) -> None:
        """Take the rows of one layer.

        Args:
            own: the rows, whose own rotary, if any, is a `ShardRotary`.
            shards: which tokens they are.
            rotary: how the model rotates; None: it does not.
            total: tokens of the whole context.
            nodes: summaries that all ranks know.
        """
        assert (own.rotary is None) == (rotary is None), "keys and queries are rotated alike"
        self.own, self.shards, self.rotary, self.total, self.nodes = own, shards, rotary, total, nodes

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.own.length

    @property
    def kv_heads(self) -> int:
        """See `LayerKV`."""
        return self.own.kv_heads

    def keys(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self.own.keys(start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self.own.values(start, stop)

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self.own.keys_at_own_positions(start, stop)

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self.own.gather_keys(index)

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self.own.gather_values(index)

    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        return self.own.gather(index, rotated=rotated)

    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """See `LayerKV`: of every full block of rows, which must lie within a unit."""
        assert self.shards.unit % block == 0, "a block of rows is a block of tokens"
        return self.own.summary(what, block)
