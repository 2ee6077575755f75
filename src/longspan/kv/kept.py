"""One layer's keys and values where every KV head keeps its own tokens and forgets the others for good.

Where all heads keep equally many, they share pages. Where their shares differ, each head has pages of its own (in one
pool, so that what one head gives up another can take): memory is really freed. Tokens that were not committed can be
taken back; committed ones can't, since what they made the heads forget does not come back.

Rows that a smaller format rounded would be rounded anew wherever eviction moves them. So what is read stays exact until
`settle`, which is said once all of a document was read and evicted. Where a budget is to hold as many rows as it can,
pages are written down as they fill up, as those of other contexts are.
It does not know which tokens are worth keeping, nor when to forget: `attention/evicting.py` does.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from longspan.kv import formats
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import SUMMARY, PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.rows import KeptRows
from longspan.kv.tiers import Tiers
from longspan.kv.undisturbed import Undisturbed

_POSITION = 4
"""Bytes of the token that a row is."""


class KeptKV:
    """The kept keys and values of one layer of one context (B = 1)."""

    def __init__(
        self,
        kv_heads: int,
        dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        rotary: Rotary | None = None,
        budget: Budget | None = None,
        *,
        kv_format: str | None = None,
        apart: bool = False,
        tiers: Tiers | None = None,
    ) -> None:
        """Start empty.

        Args:
            kv_heads: KV heads of the layer.
            dim: size of a key.
            value_dim: size of a value.
            dtype: the float type that keys and values come in.
            device: where pages lie.
            rotary: how the model encodes positions; None: it does not.
            budget: this session's bytes; None: no limit.
            kv_format: format of full pages; None: the float type itself. Rows move between pages, so that fp8 takes
                scales that let them keep their numbers (`formats.written_again`).
            apart: whether heads may keep different numbers of tokens.
            tiers: where rows move, and are read from, that the budget does not hold; None: nowhere.

        Raises:
            UnknownNameError, UsageError: as `PagePool` and `PagedKV`.
        """
        self.groups_of = 1 if apart else kv_heads
        pool = PagePool(
            self.groups_of,
            dim,
            value_dim,
            dtype,
            device,
            None if budget is None else budget.root,
            kv_format=formats.written_again(kv_format),
            tiers=tiers,
        )
        self.pool = pool
        self.groups = [KeptRows(pool, rotary, budget) for _ in range(kv_heads // self.groups_of)]
        for group in self.groups:
            group.pages.reads_below = tiers is not None
        self._committed = 0
        self._at_once = budget is not None and budget.limited

    @property
    def rotary(self) -> Rotary | None:
        """How the model encodes positions."""
        return self.groups[0].rotary

    @property
    def kv_heads(self) -> int:
        """Number of KV heads."""
        return self.groups_of * len(self.groups)

    @property
    def length(self) -> int:
        """Number of tokens of the context, evicted ones included."""
        return min(group.length for group in self.groups)

    @property
    def held(self) -> int:
        """Rows of the KV head that holds the most."""
        return max(group.held for group in self.groups)

    @property
    def total(self) -> int:
        """Rows of all KV heads together."""
        return self.groups_of * sum(group.held for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of pages, positions and of what was learned."""
        return sum(group.nbytes for group in self.groups)

    def census(self) -> Counter[str]:
        """Return how many pages this context holds, by format."""
        return sum((group.pages.census() for group in self.groups), Counter[str]())

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages, which are what a budget counts."""
        return sum(group.pages.nbytes for group in self.groups)

    @property
    def least_bytes(self) -> int:
        """Bytes without which not even one token can be kept."""
        return self.pool.least_bytes * len(self.groups)

    def rows_within(self, nbytes: int, chunk: int) -> int:
        """Return how many rows a head, on average, are sure to fit so many bytes of pages.

        Args:
            nbytes: of all pages.
            chunk: the most of these rows that are ever read together, or taken back.
        """
        pool, groups = self.pool, len(self.groups)
        native, made = pool.native.page_bytes, pool.format
        pages = nbytes // native
        if made is not pool.native.format:
            # Pages that stay exact, those of a chunk among them; two of them may not be full.
            exact = sum(-(-count // PAGE) for count in (made.sinks, made.residual, chunk)) + 2
            within = (nbytes - groups * exact * native) // pool.plane(made.name).page_bytes
            pages = within + groups * (exact - 2) if within >= 0 else pages
        # Heads that hold different numbers may each have a page that is not full.
        lost = groups if groups > 1 else 0
        return max(0, (pages - lost) * PAGE // groups)

    @property
    def page_cost(self) -> int:
        """Bytes of one full page of one group of heads in the pool's format, with positions and what was learned."""
        return self.pool.plane(self.pool.format.name).page_bytes + self._beside

    def rows_of(self, nbytes: int, layers: int = 1) -> int:
        """Return how many rows a head, on average, can hold in so many bytes, positions among them, in full pages.

        All of them must be committed, and no page be shared out among heads.

        Args:
            nbytes: of all layers.
            layers: like this one, which share them.
        """
        made, groups, native = self.pool.format, len(self.groups) * layers, self.pool.native
        dearer = native.page_bytes + self._beside - self.page_cost
        exact = 0 if made is native.format else groups * (-(-made.sinks // PAGE) + -(-made.residual // PAGE))
        pages = max(0, nbytes // self.page_cost)
        while pages > 0 and pages * self.page_cost + min(pages, exact) * dearer > nbytes:
            pages -= 1
        return pages * PAGE // groups

    @property
    def _beside(self) -> int:
        return PAGE * self.groups_of * (_POSITION + self.groups[0].learned.row_bytes)

    def split(self, heads: Tensor) -> Iterator[tuple[KeptRows, Tensor]]:
        """Yield the rows of each group of heads, and those of `heads` `[1, Hq or Hkv, ...]` that belong to them."""
        step = heads.shape[1] // len(self.groups)
        for i, group in enumerate(self.groups):
            yield group, heads[:, i * step : (i + 1) * step]

    def head_keys(self, head: int, length: int) -> tuple[Tensor, Tensor]:
        """Return one KV head's unrotated keys `[n, D]` and tokens int64 `[n]`, of the first `length` tokens."""
        group, within = self.groups[head // self.groups_of], head % self.groups_of
        stop = group.held - (group.length - length)
        return group.pages.keys(0, stop)[0, within], group.positions(0, stop)[within]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the unrotated keys `[1, Hkv, T, D]` and values `[1, Hkv, T, Dv]` of the next T tokens.

        Raises:
            PoolExhaustedError: the pages for them are more than the budget has left; nothing was added.
        """
        before = self.length
        try:
            for (group, keys), (_, values) in zip(self.split(k), self.split(v), strict=True):
                group.append(keys, values)
        except BaseException:
            self.truncate(before)
            raise

    def commit(self) -> None:
        """Say that the tokens so far were read for good."""
        for group in self.groups:
            group.commit(write_down=self._at_once)
        self._committed = self.length

    def settle(self) -> None:
        """Write pages down in the format: all tokens are committed, and what was to be evicted was."""
        with Undisturbed():
            for group in self.groups:
                group.commit()

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on, which were not committed; or all of them, at 0."""
        assert length == 0 or length >= self._committed, (
            "committed tokens can't be taken back where others were evicted"
        )
        for group in self.groups:
            group.truncate(min(length, group.length))
        self._committed = min(length, self._committed)

    def take_back(self, length: int) -> None:
        """Forget tokens that were not committed, from `length` on, but not what was learned of the rows before them."""
        for group in self.groups:
            group.take_back(min(length, group.length))

    def drop(self, start: int, stop: int) -> None:
        """Do nothing: what is no longer read was evicted."""

    def keep(self, indexes: Sequence[Tensor], *, settle: bool = False) -> None:
        """Keep these rows, int64 `[heads, n]` ascending a group, and evict the others. All tokens must be committed.

        `settle`: whether pages are written down in the format at once. Rows that were before go from codes to codes.

        Raises:
            PoolExhaustedError: a fork shares pages, and the budget has no room for others. Groups before the one that
                failed have evicted; every head is as it was or as it should be.
        """
        assert self._committed == self.length, "only committed tokens are evicted"
        with Undisturbed():
            for group, index in zip(self.groups, indexes, strict=True):
                group.keep(index, write_down=self._at_once or settle)

    def move_down(self, rows: int) -> None:
        """Leave so many of each head's newest rows on the device, in whole pages; the others lie below from now on.

        Raises:
            PoolExhaustedError: the tiers have no room for them. Groups before the one that failed have moved.
        """
        with Undisturbed():
            for group in self.groups:
                full = group.committed // PAGE
                group.pages.demote(range(max(0, full - rows // PAGE)), SUMMARY, keep_exact=True)

    def prefetch(self) -> None:
        """Have rows brought up that lie below and will be read."""
        for group in self.groups:
            group.pages.prefetch(sorted(group.pages.exact))

    def fork(self, budget: Budget | None = None) -> KeptKV:
        """Return a layer that shares every page until one of the two writes (PoolExhaustedError: as `PagedKV.fork`)."""
        other = copy.copy(self)
        other.groups = []
        try:
            for group in self.groups:
                other.groups.append(group.fork(budget))
        except BaseException:
            for group in other.groups:
                group.free()
            raise
        return other

    def free(self) -> None:
        """Give every page back; the layer is empty and can be used again."""
        for group in self.groups:
            group.free()
        self._committed = 0

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what `restore` takes."""
        return {
            name: tensor
            for i, group in enumerate(self.groups)
            for name, tensor in group.tensors(f"{prefix}{i}.").items()
        }

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens (errors: as `KeptRows.restore`)."""
        for i, group in enumerate(self.groups):
            group.restore(f"{prefix}{i}.", length, tensors)
        self._committed = length
