"""What mechanisms have in common that evict: each KV head keeps some keys and forgets the others for good.

A context is read in stretches. After each of them (`every` tokens, or only at the end) each head keeps its first
`sinks` keys, its newest `window` keys, and of the others those that score best, `budget` in all; a query reads what is
held when it comes. A subclass says how a row scores, and what it learns from the queries that were read. Tokens of a
question or an answer evict nothing, since they may be taken back, and nothing is learned from them.

With `heads=adaptive` the heads of a layer share their budgets, with `heads=model` those of all layers (`keeping.py`).
Up to the trained length keys are read at their true positions, beyond it as if those that are held followed one
another, so that no distance exceeds them. Given plain keys and values (`attend`), those before the first query are
held, and the queries are read in stretches.

`when=question` forgets nothing of a document: each question is read on a copy, which then evicts down to the budget
before its answer is written. What the next question asks about is still there; so are its bytes.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.dense import Dense
from longspan.attention.keeping import rows_to_keep
from longspan.attention.row_attention import attend_rows, own_count, sides
from longspan.errors import UsageError
from longspan.kernels.partial_attention import partial_attention
from longspan.kv.base import LayerKV
from longspan.kv.kept import KeptKV
from longspan.kv.rows import KeptRows, Learned

HEADS = ("same", "adaptive", "model")
WHEN = ("document", "question")


@dataclass(frozen=True)
class Reading:
    """Queries that were read for good, and what they read."""

    q: Tensor
    """Unrotated queries `[1, Hq, T, D]`."""
    turned: Tensor
    """The same, rotated to where they read."""
    keys: Tensor
    """Rows `[1, Hkv, N, D]` as they are held, rotated to where they are read; the last is that of the last query."""
    lse: Tensor
    """Log-sum-exp of each query's scores, `[1, Hq, T]`."""
    first: int
    """Position of the first query."""
    scale: float
    repeated: int = 0
    """Rows before those of a repetition (see `Evicting.repeats`); 0: these are new tokens."""


@dataclass(frozen=True)
class Evicting(Mechanism):
    """Keeps a budget of keys a KV head."""

    budget: int = 2048
    """Keys that each KV head keeps (on average, where shares differ)."""
    sinks: int = 4
    """First keys of the context that are always kept."""
    window: int = 32
    """Newest keys that are always kept."""
    heads: str = "same"
    """Whether all KV heads keep equally many (`same`), or share their budgets: those of a layer (`adaptive`), or those
    of all layers (`model`), where scores of different layers can be compared."""
    safeguard: float = 0.2
    """Share of the budget that each head keeps for sure where shares differ."""
    every: int = 0
    """Tokens of a document between two evictions; 0: only after all of it, or where there is no room for more."""
    when: str = "document"
    """What evicts: the `document` as it is read, for good; or each `question`, on a copy of the whole document."""

    repeats: ClassVar[bool] = False
    """Whether a context is read once more before keys are evicted, and `learn` is told of that (`Reading.repeated`)."""
    evicts: ClassVar[bool] = True
    bounded_memory: ClassVar[bool] = True
    reads_all: ClassVar[bool] = True
    decode_order: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("sinks", self.sinks, 0)
        at_least("window", self.window, 0)
        at_least("every", self.every, 0)
        one_of("heads", self.heads, HEADS)
        one_of("when", self.when, WHEN)
        if not 0 <= self.safeguard <= 1:
            raise UsageError(f"safeguard={self.safeguard} is no share: it must be between 0 and 1")
        if self.budget < self.least:
            raise UsageError(
                f"budget={self.budget} is too small: window={self.window} and sinks={self.sinks} need {self.least}"
            )

    # --- what a subclass says -----------------------------------------------------------------------------------

    @abstractmethod
    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """Return how much each row is worth, `[Hkv, rows.held]`; the highest stay.

        Args:
            rows: of some KV heads, with what was learned of them.
            own: whether keys are read at their own positions (see `KeptRows.keys_as_read`).
        """

    def learn(self, known: Learned, reading: Reading) -> Learned:
        """Return what is known after more queries were read for good; by default nothing."""
        return known

    def keeps(self, n: int) -> int:
        """Return how many keys a head keeps of a context of n tokens."""
        return self.budget

    def decode(self, q: Tensor, k: Tensor, v: Tensor, rows: KeptRows, own: bool, scale: float) -> Tensor:
        """Attend from the last row in a step of decode, by default to all rows.

        Args:
            q: `[1, Hq, 1, D]`, rotated to where it reads.
            k: all rows `[1, Hkv, N, D]`, rotated to where they are read.
            v: `[1, Hkv, N, Dv]`.
            rows: the same, as they are held.
            own: whether they are read at their own positions.
            scale: what scores are multiplied by.

        Returns:
            `[1, Hq, 1, Dv]`.
        """
        return partial_attention(q, k, v, scale=scale)[0]

    # --- attending ----------------------------------------------------------------------------------------------

    @property
    def least(self) -> int:
        """Return the fewest keys that a head may keep."""
        return self.sinks + self.window + 1

    @property
    def per_question(self) -> bool:
        """Whether documents stay whole, and each question evicts on a copy."""
        return self.when == "question"

    def unevicted(self, n: int) -> Evicting | None:
        """Return what reads n tokens as this does, and evicts none of them; None: this evicts on the way."""
        return None if self.every and not self.per_question else replace(self, budget=max(n, self.budget))

    def asked(self, count: int, n: int) -> Evicting:
        """Return this mechanism for one question of `count` tokens, the last of n: they observe, and they stay.

        A question longer than half of what is kept stays with its newest tokens alone.
        """
        return replace(self, window=max(self.window, min(count, self.keeps(n) // 2 - self.sinks)))

    def attend_kept(
        self, q: Tensor, kv: KeptKV, *, scale: float, learn: bool, decode: bool, repeat: bool = False
    ) -> Tensor:
        """Attend from the last T tokens, whose keys and values the layer holds already.

        Args:
            q: unrotated queries `[1, Hq, T, D]`; any float type.
            kv: the layer.
            scale: what scores are multiplied by.
            learn: whether something is learned from the queries, which are read for good.
            decode: whether this is a step of decode; then T is 1.
            repeat: whether these tokens repeat the committed ones.

        Returns:
            `[1, Hq, T, Dv]` in q's type; computed in float32 (float64 where q is).
        """
        computed = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        parts = [self._attend(part, rows, scale, learn, decode, repeat) for rows, part in kv.split(computed)]
        return torch.cat(parts, 1).to(q.dtype)

    def _attend(self, q: Tensor, rows: KeptRows, scale: float, learn: bool, decode: bool, repeat: bool) -> Tensor:
        count, repeated = q.shape[2], rows.committed if repeat else 0
        token, row, known = rows.length - count, rows.held - count, rows.learned
        outs = []
        for start, stop, own in sides(rows, token, count):
            part = q[:, :, start:stop]
            turned = part if rows.rotary is None else rows.rotary.range(part, (token if own else row) + start)
            k, v = rows.keys_as_read(row + stop, own), rows.pages.values(0, row + stop)
            if decode:
                return self.decode(turned, k.to(q.dtype), v.to(q.dtype), rows, own, scale)
            out, lse = attend_rows(turned, k, v, scale, self.gpu_tile if q.is_cuda else self.tile)
            outs.append(out)
            if learn:
                known = self.learn(known, Reading(part, turned, k, lse, token + start, scale, repeated))
        if learn:
            rows.learn(replace(known, length=rows.length))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    @property
    def apart(self) -> bool:
        """Whether KV heads may hold different numbers of keys."""
        return self.heads != "same"

    def evict(self, kv: KeptKV, keep: int, most: int | None = None, unit: int = 1, *, settle: bool = False) -> None:
        """Evict in one layer: see `evict_all`."""
        self.evict_all([kv], keep, most, unit, settle=settle)

    @torch.no_grad()
    def evict_all(
        self, layers: Sequence[KeptKV], keep: int, most: int | None = None, unit: int = 1, *, settle: bool = False
    ) -> None:
        """Keep so many rows a head (on average, where shares differ), if more are held in all or by one.

        Args:
            layers: those whose heads share their budgets, or one; all of their tokens are committed.
            keep: rows, at least `least`.
            most: rows that one head may keep at most.
            unit: rows that a head keeps a multiple of, where shares differ.
            settle: whether what is kept is written down in the pages' format (see `KeptKV.settle`).

        Raises:
            PoolExhaustedError: a fork shares pages, and the budget has no room for others.
        """
        heads = sum(kv.kv_heads for kv in layers)
        if sum(kv.total for kv in layers) <= keep * heads and (most is None or max(kv.held for kv in layers) <= most):
            return
        kept = rows_to_keep(
            [self.scores(rows, bool(own_count(rows, kv.length, 1))) for kv in layers for rows in kv.groups],
            keep,
            sinks=self.sinks,
            window=self.window,
            safeguard=self.safeguard if self.apart else None,
            most=most,
            unit=unit,
        )
        chosen = iter(kept)
        for kv in layers:
            kv.keep(list(itertools.islice(chosen, len(kv.groups))), settle=settle)
            if not self.every and not self.per_question:
                # What queries said of the rows was for this eviction; a later document brings queries of its own.
                for rows in kv.groups:
                    rows.learn(replace(rows.learned, whole={}))
                    rows.commit()

    def attend(self, q: Tensor, kv: LayerKV, *, scale: float | None = None, hints: Hints | None = None) -> Tensor:
        """See `Mechanism.attend`; evicting takes no gradient."""
        count, n = q.shape[2], kv.length
        if not self._as_dense(n - count, n):
            with torch.no_grad():
                return self._in_stretches(q, kv, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return super().attend(q, kv, scale=scale, hints=hints)

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`: where nothing is evicted, every key is read."""
        return Dense().attend_tile(q, kv, first, scale, hints)

    def _as_dense(self, first: int, stop: int) -> bool:
        """Whether the queries `first .. stop - 1`, before which everything is held, read everything."""
        return (
            self.every == 0 or self.per_question or not any(at > self.keeps(at) for at in self._evictions(first, stop))
        )

    def _evictions(self, first: int, stop: int) -> range:
        """Return after which of the lengths `first + 1 .. stop - 1` keys are evicted."""
        return range((first // self.every + 1) * self.every, stop, self.every)

    def _in_stretches(self, q: Tensor, kv: LayerKV, scale: float) -> Tensor:
        first, n = kv.length - q.shape[2], kv.length
        k, v = kv.keys(0, n), kv.values(0, n)
        stops = [*(self._evictions(first, n) if self.every else ()), n]
        batches = []
        for b in range(q.shape[0]):
            layer = KeptKV(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device, kv.rotary, apart=self.apart)
            layer.append(k[b : b + 1, :, :first], v[b : b + 1, :, :first])
            layer.commit()
            outs = []
            for start, stop in itertools.pairwise([first, *stops]):
                layer.append(k[b : b + 1, :, start:stop], v[b : b + 1, :, start:stop])
                part = q[b : b + 1, :, start - first : stop - first]
                outs.append(self.attend_kept(part, layer, scale=scale, learn=stop < n, decode=q.shape[2] == 1))
                layer.commit()
                if stop < n:
                    self.evict(layer, self.keeps(stop))
            batches.append(torch.cat(outs, 2))
        return torch.cat(batches)

    # --- what it takes ------------------------------------------------------------------------------------------

    def within(self, keys: int, n: int) -> Evicting:
        """See `Mechanism.within`; the window takes at most a quarter, and sinks at most a sixteenth."""
        return replace(self, budget=keys, window=min(self.window, keys // 4), sinks=min(self.sinks, keys // 16))

    def learned_bytes(self, keys: int, shape: Shape) -> float:
        """Return the bytes of what was learned, where so many keys are kept."""
        return 0.0

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; kept are keys, values, positions and what was learned."""
        keys = min(n, self.keeps(n))
        prefill = n * shape.read_flops((n + 1) / 2)
        # A question's own copy comes on top of the document.
        kept = keys + n if self.per_question and keys < n else keys
        if self.every and not self.per_question:
            most = min(n, keys + self.every)
            prefill = most * shape.read_flops((most + 1) / 2) + (n - most) * shape.read_flops(keys + self.every / 2)
        return Cost(
            decode_flops=shape.read_flops(keys),
            decode_bytes=keys * shape.token_bytes,
            prefill_flops=prefill,
            kept_bytes=kept * (shape.token_bytes + 4 * shape.kv_heads) + self.learned_bytes(kept, shape),
            decode_keys=keys,
        )
