"""Keys and values of which some were evicted: the rows that stay, which token each is, and what was learned of them.

A row is one token of every KV head held here; heads may hold different tokens, each equally many, in ascending order.
Rows lie in pages (`pages.py`), which bring formats, budgets and forks along. New tokens follow the last row. Eviction
moves rows together; pages in front of the first gap are not written again. What a mechanism learned of tokens that it
read for good (`Learned`) is never changed but replaced: forks share it, and an interrupted chunk leaves no trace.
It does not know which rows are worth keeping: mechanisms do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.undisturbed import Undisturbed


@dataclass(frozen=True)
class Learned:
    """What a mechanism knows of the first `length` tokens of a context."""

    length: int = 0
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """`[Hkv, n, ...]` by name, one entry a row, of the first n rows; eviction takes entries out with their rows."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Of any shape, by name: what eviction does not touch."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.rows.values(), *self.whole.values()))

    @property
    def row_bytes(self) -> int:
        """Bytes of what is known of one row of one head."""
        return sum(tensor[0, 0].nbytes for tensor in self.rows.values() if tensor.numel())

    def kept(self, index: Tensor, held: int) -> Learned:
        """Return what is known of the rows `[Hkv, n]` in `index`, of `held` rows; what was not learned counts 0."""
        rows = {}
        for name, known in self.rows.items():
            rest = known.new_zeros(known.shape[0], held - known.shape[1], *known.shape[2:])
            at = index.view(*index.shape, *[1] * (known.dim() - 2)).expand(*index.shape, *known.shape[2:])
            rows[name] = torch.cat([known, rest], 1).gather(1, at)
        return Learned(self.length, rows, self.whole)


class KeptRows:
    """The rows of the KV heads of one pool, all of which hold equally many."""

    def __init__(self, pool: PagePool, rotary: Rotary | None = None, budget: Budget | None = None) -> None:
        """Start empty; arguments as for `PagedKV`."""
        # Pages hold rows, whose place is no position: they must not rotate anything.
        self.pages = PagedKV(pool, None, budget)
        self.rotary = rotary
        self.learned = self._lasting = Learned()
        self._kept = torch.empty(pool.kv_heads, 0, dtype=torch.int32, device=pool.device)  # contexts end before 2^31
        self._evicted_at = 0
        self.committed = 0
        """Rows held at the last commit."""
        self._mirrors_own = True
        self._bounds: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def held(self) -> int:
        """Number of rows."""
        return self.pages.length

    @property
    def length(self) -> int:
        """Number of tokens of the context, evicted ones included."""
        return self.held + self.evicted

    @property
    def evicted(self) -> int:
        """Tokens that each head has evicted: the newest tokens' rows stand so many places before their positions."""
        return self._evicted_at - self._kept.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of pages, positions and of what was learned."""
        learned = self.learned.nbytes + (0 if self._lasting is self.learned else self._lasting.nbytes)
        return self.pages.nbytes + self._kept.nbytes + learned

    def positions(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return which tokens the rows `start .. stop - 1` are: int64 `[Hkv, stop - start]`, ascending."""
        stop = self.held if stop is None else stop
        split = self._kept.shape[1]
        newer = torch.arange(max(start, split), max(stop, split), device=self._kept.device) + self.evicted
        return torch.cat([self._kept[:, start:stop].long(), newer.expand(self._kept.shape[0], -1)], 1)

    def keys_as_read(self, stop: int, own: bool) -> Tensor:
        """Return the keys `[1, Hkv, stop, D]` of the first rows, rotated to where they are read.

        Args:
            stop: number of rows.
            own: whether each is read at its own position in the context; else at its place among the rows.
        """
        own = own or not self.evicted
        if self.rotary is None:
            return self.pages.keys(0, stop)
        if self.pages.budget.limited:
            return self._rotated(0, stop, own)
        # The pages' own mirror, which they clear where they write rows down anew.
        if own != self._mirrors_own:
            self.pages.mirror.clear()
            self._mirrors_own = own
        return self.pages.mirror.read(stop, lambda first, last: self._rotated(first, last, own))

    def bounds(self, keys: Tensor, size: int, own: bool) -> list[tuple[Tensor, Tensor]]:
        """Return the least and the greatest key, channel by channel, of every `size` rows.

        Args:
            keys: all rows `[Hkv, held, D]` as `keys_as_read` gives them for this `own`.
            size: rows in a chunk.
            own: as there.

        Returns:
            `(lowest, highest)`, each `[Hkv, chunks, D]`: of full chunks, then of the rest where there is one.
        """
        full = keys.shape[1] // size
        known = self._bounds.get((size, own), (keys[:, :0], keys[:, :0]))
        if known[0].shape[1] != full:
            known = (known[0][:, :full], known[1][:, :full])
            fresh = keys[:, known[0].shape[1] * size : full * size].unflatten(1, (-1, size))
            known = (torch.cat([known[0], fresh.amin(2)], 1), torch.cat([known[1], fresh.amax(2)], 1))
            if not self.pages.budget.limited:
                self._bounds[size, own] = known
        rest = keys[:, full * size :]
        return [known] if rest.shape[1] == 0 else [known, (rest.amin(1, keepdim=True), rest.amax(1, keepdim=True))]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add the unrotated keys `[1, Hkv, T, D]` and values of the next T tokens (PoolExhaustedError: nothing was)."""
        self.pages.append(k, v)
        self._follow_rewriting()

    def learn(self, learned: Learned) -> None:
        """Take what is known now; until the next commit, cutting tokens off brings the old knowledge back."""
        self.learned = learned

    def commit(self, *, write_down: bool = True) -> None:
        """Say that the tokens so far were read for good; `write_down`: as for `PagedKV.commit`."""
        self.pages.commit(write_down=write_down)
        self._follow_rewriting()
        self._lasting, self.committed = self.learned, self.held

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on; committed ones can only be forgotten all together."""
        if length == 0:
            self.pages.truncate(0)
            self._kept, self._evicted_at = self._kept[:, :0], 0
            self.learned = self._lasting = Learned()
            self.committed = 0
            self._forget(0)
            return
        assert length >= self._evicted_at, "what was evicted can't be brought back"
        self.pages.truncate(length - self.evicted)
        self.committed = min(self.committed, self.held)
        self._forget(self.held)
        if length < self.learned.length:
            assert length >= self._lasting.length, "what was learned for good can't be forgotten in part"
            self.learned = self._lasting

    def take_back(self, length: int) -> None:
        """Forget tokens that were not committed, from `length` on, but not what was learned of the rows before them."""
        learned = self.learned
        self.truncate(length)
        self.learn(replace(learned, length=min(learned.length, length)))

    def keep(self, index: Tensor, *, write_down: bool = True) -> None:
        """Keep the rows `[Hkv, n]` in `index` (int64, ascending) and evict the others. All rows must be committed.

        `write_down`: as for `PagedKV.commit`.

        Raises:
            PoolExhaustedError: a fork shares the pages, and the budget has no room for others; nothing was changed.
        """
        kept = index.shape[1]
        if kept == self.held:
            return
        moved = (index != torch.arange(kept, device=index.device)).any(0)
        start = (int(moved.int().argmax()) if bool(moved.any()) else kept) // PAGE * PAGE
        k, v = self.pages.gather(index[:, start:].unsqueeze(0), rotated=False)
        codes = self.pages.gather_codes(index[:, start:]) if write_down else {}
        positions, learned = self.positions().gather(1, index), self.learned.kept(index, self.held)
        length = self.length
        with Undisturbed():
            self.pages.replace(start, k, v, codes, write_down=write_down)
            self._kept, self._evicted_at, self.learned = positions.int(), length, learned
            self._forget(start)
            self.commit(write_down=write_down)

    def fork(self, budget: Budget | None = None) -> KeptRows:
        """Return the same rows, whose pages are shared until one of the two writes (PoolExhaustedError: see there)."""
        other = copy.copy(self)
        other.pages, other._bounds = self.pages.fork(budget), dict(self._bounds)
        return other

    def free(self) -> None:
        """Give every page back."""
        self.truncate(0)
        self.pages.free()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what `restore` takes; tokens that were not committed must be cut off first."""
        out = {f"{prefix}kept": self._kept, f"{prefix}at": torch.tensor([self._evicted_at, self.learned.length])}
        out |= {f"{prefix}rows.{name}": tensor for name, tensor in self.learned.rows.items()}
        out |= {f"{prefix}whole.{name}": tensor for name, tensor in self.learned.whole.items()}
        return out | self.pages.tensors(prefix)

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens.

        Raises:
            SessionCorruptError: it does not fit.
            PoolExhaustedError: it is more than the budget has left. In both cases the rows are as they were.
        """
        beside = tuple(prefix + part for part in ("kept", "at", "rows.", "whole."))
        own = [name for name in tensors if name.startswith(beside)]
        found = {name.removeprefix(prefix): tensors[name] for name in own}
        kept, at = found.get("kept"), found.get("at")
        if kept is None or at is None or kept.shape[:1] != self._kept.shape[:1] or kept.dim() != 2 or at.numel() != 2:
            raise _unfit()
        evicted_at, seen = at.tolist()
        ascending = bool((kept.diff(dim=1) > 0).all()) and bool((kept >= 0).all()) and bool((kept < evicted_at).all())
        learned = Learned(
            seen,
            {name[5:]: tensor.to(self._kept.device) for name, tensor in found.items() if name.startswith("rows.")},
            {name[6:]: tensor.to(self._kept.device) for name, tensor in found.items() if name.startswith("whole.")},
        )
        held = length - (evicted_at - kept.shape[1])
        known = all(t.shape[0] == kept.shape[0] and t.shape[1] <= held for t in learned.rows.values())
        if not (ascending and known and kept.shape[1] <= evicted_at <= length and 0 <= seen <= length):
            raise _unfit()
        self.pages.restore(prefix, held, tensors)
        self._kept, self._evicted_at = kept.to(self._kept), evicted_at
        self.learned, self._lasting, self.committed = learned, learned, held
        self._forget(0)

    def _forget(self, row: int) -> None:
        """Forget what was computed from the rows from `row` on."""
        if row == 0:
            self.pages.mirror.clear()
        self.pages.mirror.truncate(row)
        self._bounds = {
            (size, own): (low[:, : row // size], high[:, : row // size])
            for (size, own), (low, high) in self._bounds.items()
            if row >= size
        }

    def _follow_rewriting(self) -> None:
        """Forget bounds of rows that a smaller format has rounded since: pages clear their mirror then."""
        if not self.pages.mirror.length:
            self._bounds = {}

    def _rotated(self, start: int, stop: int, own: bool) -> Tensor:
        """Return the keys of some rows, rotated to their own positions or to their places."""
        assert self.rotary is not None
        keys, split = self.pages.keys(start, stop), min(max(self._kept.shape[1], start), stop)
        if not own or start == split:
            return self.rotary.range(keys, start + (self.evicted if own else 0))
        old = self.rotary(keys[:, :, : split - start], self._kept[:, start:split].long())
        return torch.cat([old, self.rotary.range(keys[:, :, split - start :], split + self.evicted)], 2)


def _unfit() -> SessionCorruptError:
    return SessionCorruptError("the saved rows do not fit the model: remove the session and read again")
