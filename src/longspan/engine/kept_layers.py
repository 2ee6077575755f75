"""Every layer's keys and values under a mechanism that evicts, and when it must.

Keys are evicted where the mechanism's own schedule says so, and before that where the next chunk would pass the
trained length (rows held are read at the positions that the model knows) or the byte budget. Then fewer may be kept
than the mechanism would (`Mechanism.within`): room is left for a chunk of documents, or a question and its answer.
Statistics and positions are no keys: the budget does not count them, `nbytes` does. It does not know how rows score.

With `when=question` documents stay whole, as far as positions and bytes allow, and `asked` is the copy on which one
question is read and evicts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.attention.evicting import Evicting
from longspan.engine.contexts import kv_head
from longspan.errors import PoolExhaustedError, UsageError
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget, size
from longspan.kv.kept import KeptKV
from longspan.kv.tiers import Tiers
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import Head, RetrievalHeads


class KeptLayers:
    """What all layers of one context keep."""

    def __init__(
        self,
        model: CausalModel,
        mechanism: Evicting,
        kv_format: str | None,
        budget: Budget,
        tiers: Tiers | None = None,
    ) -> None:
        """Start empty.

        Args:
            model: whose layers they are.
            mechanism: by what they attend and evict.
            kv_format: format of full pages; None: the model's number type.
            budget: bytes that all layers' pages may take together.
            tiers: where a document that stays whole lies beyond the budget; None: it is evicted down to that.

        Raises:
            UnknownNameError, UsageError: no such format, or a budget below one page a layer.
        """
        self.model, self.mechanism, self.budget = model, mechanism, budget
        sizes = model.dimensions
        self.layers = [
            KeptKV(
                sizes.kv_heads,
                sizes.head_dim,
                sizes.head_dim,
                model.dtype,
                model.device,
                model.rotary,
                budget,
                kv_format=kv_format,
                apart=mechanism.apart,
                tiers=tiers,
            )
            for _ in range(sizes.layers)
        ]
        budget.require(sum(kv.least_bytes for kv in self.layers), f"one page for each of {sizes.layers} layers")
        self.whole = mechanism.per_question
        """Whether documents are kept as a whole, and evicting is left to copies of these layers."""
        self.settles = True
        """Whether rows are written down in the format once a document was read (`KeptKV.settle`)."""
        self._below = self.whole and tiers is not None

    @classmethod
    def of(
        cls,
        model: CausalModel,
        mechanism: Mechanism,
        kv_format: str | None,
        budget: Budget,
        tiers: Tiers | None = None,
    ) -> KeptLayers | None:
        """Return empty layers for a mechanism that evicts; None: it does not. Arguments and errors as above."""
        return cls(model, cast("Evicting", mechanism), kv_format, budget, tiers) if mechanism.evicts else None

    @property
    def held(self) -> int:
        """Rows of the KV head that holds the most: the positions that the context takes beyond the trained length."""
        return max(kv.held for kv in self.layers)

    @property
    def chunk(self) -> int:
        """Tokens that may be read together: so few that most of the trained length is left for what is kept."""
        return max(PAGE, self.model.dimensions.window // 4)

    def next_stop(self, length: int) -> int:
        """Return the length that no chunk may pass: where keys are evicted next by schedule."""
        every = 0 if self.whole else self.mechanism.every
        return (length // every + 1) * every if every else length + self.chunk

    def make_room(self, length: int, new: int, chunk: int) -> None:
        """Evict before `new` more tokens are read for good, where schedule, positions or bytes ask for it.

        Args:
            length: tokens read so far, all of them committed.
            new: tokens to come.
            chunk: the most that are ever read together.

        Raises:
            PoolExhaustedError: the byte budget does not hold a page of keys and a chunk.
        """
        scheduled = not self.whole and self.mechanism.every > 0 and length % self.mechanism.every == 0
        rows = self._rows_left(chunk)
        for layers in self._sharing:
            if scheduled or self._crowded(layers, new, rows):
                self._evict(layers, length, new, rows, chunk)

    def crowded(self, new: int, chunk: int) -> bool:
        """Return whether `new` more tokens leave no room, in positions or bytes; arguments as for `make_room`."""
        rows = self._rows_left(chunk)
        return any(self._crowded(layers, new, rows) for layers in self._sharing)

    def finish(self, length: int, chunk: int) -> None:
        """Evict after all was read; arguments and errors as for `make_room`."""
        rows = self._rows_left(chunk)
        for layers in self._sharing:
            self._evict(layers, length, 0, rows, chunk, self.settles)
        self._settle()

    def shrink(self, length: int, nbytes: int) -> None:
        """Evict once, after all was read, so that all layers take at most so many bytes, positions among them.

        What is left over of a page in every layer is put together: some layers keep a page more than others.

        Raises:
            UsageError: the bytes hold no page of every layer; nothing was evicted.
        """
        unit, count = self.layers[0].page_cost, len(self.layers)
        if len(self._sharing) == 1:
            rows = [self.layers[0].rows_of(nbytes, count)]
        else:
            ends = [i * nbytes // count // unit for i in range(count + 1)]
            rows = [self.layers[0].rows_of((stop - start) * unit) for start, stop in itertools.pairwise(ends)]
        if min(rows) < 1:
            raise UsageError(f"{size(nbytes)} do not hold a page of keys of every layer: allow more")
        for layers, keep in zip(self._sharing, rows, strict=True):
            if sum(kv.total for kv in layers) > keep * sum(kv.kv_heads for kv in layers):
                self.mechanism.within(keep, length).evict_all(layers, keep, unit=PAGE, settle=self.settles)
        self._settle()

    def asked(self, count: int, length: int) -> KeptLayers:
        """Return a copy that shares every page, on which a question of `count` tokens is read after `length` others.

        Once it was read, `finish` evicts there. PoolExhaustedError: as `fork`.
        """
        other = self.fork(self.budget)
        other.mechanism, other.whole = self.mechanism.asked(count, length + count), False
        # Its rows were rounded with the document's; for the time of a question they are not rounded again.
        other.settles = False
        return other

    def reader(self, *, learn: bool) -> Reader:
        """Return what adds new tokens to every layer and attends from them; `learn`: they are read for good."""
        return _Reader(self, learn)

    def repeating(self) -> Reader:
        """Return what reads a repetition of the committed tokens, until `take_back`; see `Evicting.repeats`."""
        return _Reader(self, learn=True, repeat=True)

    def take_back(self, length: int) -> None:
        """Forget a repetition, from `length` on, but not what was learned from it."""
        for kv in self.layers:
            kv.take_back(length)

    @property
    def spare(self) -> int:
        """Positions that are left free for a repetition."""
        return self.chunk if self.mechanism.repeats else 0

    def mass(self, queries: Mapping[Head, Tensor], heads: RetrievalHeads, length: int) -> Tensor:
        """Return the attention mass `[heads, length]` that queries put on each token; 0 where a head evicted it."""
        found = torch.zeros(len(queries), length)
        for i, head in enumerate(queries):
            keys, tokens = self.layers[head[0]].head_keys(kv_head(self.model, head), length)
            sinks = int((tokens < heads.sinks).sum())
            found[i, tokens.cpu()] = token_mass({head: queries[head]}, {head: keys}, sinks=sinks)[0]
        return found

    def fork(self, budget: Budget) -> KeptLayers:
        """Return layers that share every page until one of the two writes (PoolExhaustedError: as `PagedKV.fork`)."""
        other = copy.copy(self)
        other.budget, other.layers = budget, []
        try:
            for kv in self.layers:
                other.layers.append(kv.fork(budget))
        except BaseException:
            for kv in other.layers:
                kv.free()
            raise
        return other

    @property
    def _sharing(self) -> list[Sequence[KeptKV]]:
        """The layers, those together whose heads share their budgets."""
        return [self.layers] if self.mechanism.heads == "model" else [[kv] for kv in self.layers]

    def _settle(self) -> None:
        if self.settles:
            for kv in self.layers:
                kv.settle()

    def _rows_left(self, chunk: int) -> int | None:
        """Return how many rows a head may hold, on average, within the bytes that are left; None: any number."""
        if not self.budget.limited:
            return None
        left = self.budget.left
        assert left is not None, "a limited budget has something left, be it nothing"
        nbytes = sum(kv.page_bytes for kv in self.layers) + left
        return self.layers[0].rows_within(nbytes // len(self.layers), chunk)

    def _crowded(self, layers: Sequence[KeptKV], new: int, rows: int | None) -> bool:
        """Whether `new` more tokens pass the trained length, or what layers that share their budgets may hold."""
        total, heads = sum(kv.total for kv in layers), sum(kv.kv_heads for kv in layers)
        full = rows is not None and -(-total // heads) + new > rows
        return full or max(kv.held for kv in layers) + new > self.model.dimensions.window - self.spare

    def _evict(
        self, layers: Sequence[KeptKV], length: int, new: int, rows: int | None, chunk: int, settle: bool = False
    ) -> None:
        """Evict down to what the mechanism keeps, or to as much of it as leaves room for a chunk."""
        window, mechanism = self.model.dimensions.window, self.mechanism
        # Beyond the trained length a quarter of it is left for questions and answers, which follow the rows.
        most = window - window // 4 - self.spare if length + new > window else window
        wanted = mechanism.keeps(length)
        # Where documents stay whole, a question's copy needs rows of its own.
        left = most if rows is None else rows - chunk - (wanted if self.whole else 0)
        if self._below and left >= PAGE:
            for kv in layers:
                kv.move_down(left)
            left = most
        keep = min(length if self.whole else wanted, most, left)
        heads = sum(kv.kv_heads for kv in layers)
        if sum(kv.total for kv in layers) <= keep * heads and max(kv.held for kv in layers) <= most:
            return
        if keep < PAGE:
            spent = sum(one.page_bytes for one in self.layers) + (self.budget.left or 0)
            raise PoolExhaustedError(
                f"the {self.budget.root.name} budget of {size(spent)} does not hold {PAGE} keys of every layer and a "
                f"chunk of {chunk}: raise it (--kv-budget)"
            )
        if keep < wanted:
            mechanism = mechanism.within(keep, length)
        mechanism.evict_all(layers, keep, most, settle=settle)


@dataclass(frozen=True)
class _Reader:
    """See `hf.attention.Reader`."""

    kept: KeptLayers
    learn: bool
    repeat: bool = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        kv, decode = self.kept.layers[layer], not self.learn and q.shape[2] == 1
        with Undisturbed():
            kv.append(k, v)
        if layer + 1 < len(self.kept.layers):
            self.kept.layers[layer + 1].prefetch()
        how = {"learn": self.learn, "decode": decode, "repeat": self.repeat}
        return self.kept.mechanism.attend_kept(q, kv, scale=scale, **how)
