"""One layer's keys and values of a context over ranks: what a context asks of it, in tokens; what is held, in rows.

Every rank is given the keys and values of all new tokens and keeps its own (`shards.py`). What is saved is what one
rank would save: pages are handed to rank 0 and come from there, so that a session does not know how many ranks there
were.
It does not know mechanisms or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.distributed.group import Group
from longspan.distributed.nodes import Nodes
from longspan.distributed.shards import ShardRows, Shards
from longspan.errors import SessionCorruptError, SessionError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.coming import rows_in
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

_PLANES = ("k", "v")
_AT_ONCE = 512
"""Pages that are handed over in one message."""


class ShardKV:
    """One rank's part of one layer."""

    def __init__(self, held: PagedKV, shards: Shards, rotary: Rotary | None, group: Group) -> None:
        """Take empty pages and what they hold.

        Args:
            held: pages, whose rotary, if any, is a `ShardRotary`.
            shards: which tokens they are.
            rotary: how the model rotates; None: it does not.
            group: the ranks, for tensors in host memory: what is saved goes through there.
        """
        assert held.pool.format is held.pool.native.format, "pages are held as they came"
        self.held, self.shards, self.group = held, shards, group
        self.pool: PagePool = held.pool
        self.rows = ShardRows(held, shards, rotary, 0, Nodes())
        """What mechanisms read."""

    @property
    def length(self) -> int:
        """Number of tokens of the context, on whichever ranks."""
        return self.rows.total

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return self.held.nbytes + self.rows.nodes.nbytes

    def census(self) -> Counter[str]:
        """Return how many pages this rank holds, by format."""
        return self.held.census()

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep what is this rank's of the unrotated keys `[1, Hkv, T, D]` and values of the next T tokens."""
        first, stop = self.length, self.length + k.shape[2]
        begin, end = self.shards.count(first), self.shards.count(stop)
        if end > begin:
            own = (self.shards.tokens(torch.arange(begin, end)) - first).to(k.device)
            whole = end - begin == k.shape[2]
            rows = (k, v) if whole else (k.index_select(2, own), v.index_select(2, own))
            if not self.held.append_within(*rows):
                self.held.append(*rows)
        self.rows.total = stop

    def commit(self) -> None:
        """Say that the tokens so far were read for good."""
        self.held.commit()

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        # An interrupted chunk may have left more rows than are counted.
        self.held.truncate(min(self.shards.count(length), self.held.length))
        self.rows.nodes.truncate(length)
        self.rows.total = min(self.length, length)

    def drop(self, start: int, stop: int) -> None:
        """Give back the pages that lie wholly within the tokens `start .. stop - 1`."""
        self.held.drop(self.shards.count(start), self.shards.count(stop))

    def fork(self, budget: Budget | None = None) -> ShardKV:
        """Return a layer with the same tokens that shares every page until one of the two writes to it."""
        other = ShardKV(self.held.fork(budget), self.shards, self.rows.rotary, self.group)
        other.rows.total, other.rows.nodes = self.length, self.rows.nodes.fork()
        return other

    def free(self) -> None:
        """Give everything back."""
        self.truncate(0)
        self.held.free()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return on rank 0 what `PagedKV.tensors` returns where one rank holds all; on others nothing.

        Every rank calls it. Summaries are left out: they are computed again from pages.
        """
        packed = self.held.tensors("")
        numbers = self.shards.tokens(packed["pages"] * PAGE) // PAGE
        counts = self.group.gather(torch.tensor([len(numbers)])).flatten().tolist()
        mine = [numbers, *(packed[what].cpu() for what in _PLANES)]
        if self.group.rank != 0:
            for tensor in mine:
                for piece in _pieces(tensor):
                    self.group.send(piece.contiguous(), 0)
            return {}
        parts = [mine]
        for rank in range(1, self.group.size):
            taken = [tensor.new_empty(_resized(tensor, counts[rank])) for tensor in mine]
            for tensor in taken:
                for piece in _pieces(tensor):
                    piece.copy_(self.group.receive(torch.empty(piece.shape, dtype=piece.dtype), rank))
            parts.append(taken)
        pages = torch.cat([part[0] for part in parts])
        order = pages.argsort()
        rows = {what: torch.cat([part[i] for part in parts], 1)[:, order] for i, what in enumerate(_PLANES, 1)}
        return {prefix + name: tensor for name, tensor in ({"pages": pages[order]} | rows).items()}

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens; every rank calls it, rank 0 with tensors.

        Raises:
            SessionError: it does not fit, or is damaged; the layer is as it was, on every rank.
        """
        fault: SessionError | None = None
        pages = torch.empty(0, dtype=torch.int64)
        if self.group.rank == 0:
            try:
                pages = self._checked(prefix, length, tensors)
            except SessionError as error:
                fault = error
        count = int(self.group.broadcast(torch.tensor([-1 if fault else len(pages)])))
        if count < 0:
            raise fault or _unfit()
        pages = self.group.broadcast(pages if self.group.rank == 0 else torch.empty(count, dtype=torch.int64))
        own = self.shards.owns(pages * PAGE)
        native = self.held.pool.native.tensors
        rows = {what: native[what].new_empty(_resized(native[what], int(own.sum())), device="cpu") for what in _PLANES}
        done = 0
        for start in range(0, count, _AT_ONCE):
            piece = pages[start : start + _AT_ONCE]
            stop = done + int(own[start : start + _AT_ONCE].sum())
            for what in _PLANES:
                read: Tensor | None = None
                if self.group.rank == 0:
                    read = native[what].new_zeros(_resized(native[what], len(piece)), device="cpu")
                    try:
                        read = rows_in(tensors, prefix + what).read(start, start + len(piece))
                    except SessionError as error:
                        fault = error  # told when all have what they wait for
                rows[what][:, done:stop] = self._dealt(read, piece, rows[what][:, done:stop])
            done = stop
        if int(self.group.broadcast(torch.tensor([int(fault is not None)]))):
            raise fault or _unfit()
        held = self.shards.rows(pages[own] * PAGE) // PAGE
        self.held.restore("", self.shards.count(length), {"pages": held, **rows})
        self.rows.nodes.truncate(0)
        self.rows.total = length

    def _dealt(self, read: Tensor | None, pages: Tensor, like: Tensor) -> Tensor:
        """Return what of some pages is this rank's; rank 0 has read them all."""
        if read is None:
            return self.group.receive(torch.empty(like.shape, dtype=like.dtype), 0)
        for rank in range(1, self.group.size):
            self.group.send(read[:, self.shards.of(rank).owns(pages * PAGE)].contiguous(), rank)
        return read[:, self.shards.owns(pages * PAGE)]

    def _checked(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of the pages that were saved (SessionCorruptError: something does not fit)."""
        native = self.held.pool.native.tensors
        names = {name[len(prefix) :] for name in tensors if name.startswith(prefix)}
        smaller = {name for name in names if name.endswith(".pages") and name != "marks.pages"}
        if smaller or ("marks.rounded" in names and tensors[f"{prefix}marks.rounded"].numel()):
            raise SessionCorruptError("the session holds pages in a smaller format: open it on one rank")
        if not {"pages", *_PLANES} <= names:
            raise _unfit()
        pages = tensors[f"{prefix}pages"]
        whole = pages.dim() == 1 and (pages.numel() == 0 or 0 <= int(pages[0]) <= int(pages[-1]) < -(-length // PAGE))
        same = all(
            tuple(rows_in(tensors, prefix + what).shape) == _resized(native[what], pages.numel()) for what in _PLANES
        )
        if not whole or not same or not bool((pages.diff() > 0).all()):
            raise _unfit()
        return pages


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor of pages, `[Hkv, n, ...]` or `[n]`, in pieces of a bounded size."""
    return tensor.split(_AT_ONCE, min(1, tensor.dim() - 1)) if tensor.numel() else []


def _resized(tensor: Tensor, pages: int) -> tuple[int, ...]:
    """Return the shape of so many pages, `[Hkv, pages, ...]` or `[pages]`."""
    return (pages,) if tensor.dim() == 1 else (tensor.shape[0], pages, *tensor.shape[2:])


def _unfit() -> SessionCorruptError:
    return SessionCorruptError("the saved pages do not fit the model: remove the session and read again")
