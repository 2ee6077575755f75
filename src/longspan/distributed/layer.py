"""One layer's keys and values of a context over ranks: what a context asks of it, in tokens; what is held, in rows.

Every rank is given the keys and values of all new tokens and keeps its own (`shards.py`). What is saved is what one rank
would save: pages are handed to rank 0 and come from there, so that a session does not know how many ranks there were.
It does not know mechanisms or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.distributed.group import Group
from longspan.distributed.nodes import Nodes
from longspan.distributed.shards import ShardRows, Shards
from longspan.errors import SessionCorruptError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV
from longspan.kv.rotary import Rotary

_PLANES = ("k", "v")
_AT_ONCE = 1 << 28
"""Bytes of pages that are handed over in one message."""


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

        Every rank calls it.
        """
        packed = self.held.tensors("")
        numbers = self.shards.tokens(packed["pages"] * PAGE) // PAGE
        counts = self.group.gather(torch.tensor([len(numbers)])).flatten().tolist()
        if self.group.rank != 0:
            self._hand(0, [numbers, *(packed[what] for what in _PLANES)])
            return {}
        pages, parts = [numbers], [[packed[what].cpu()] for what in _PLANES]
        for rank in range(1, self.group.size):
            sizes = [packed[what].shape[::2] for what in _PLANES]
            like = [numbers.new_empty(counts[rank])]
            like += [
                packed[what].new_empty(size[0], counts[rank], PAGE, packed[what].shape[3], device="cpu")
                for what, size in zip(_PLANES, sizes, strict=True)
            ]
            taken = self._take(rank, like)
            pages.append(taken[0])
            for part, rows in zip(parts, taken[1:], strict=True):
                part.append(rows)
        order = torch.cat(pages).argsort()
        out = {f"{prefix}pages": torch.cat(pages)[order]}
        return out | {prefix + what: torch.cat(part, 1)[:, order] for what, part in zip(_PLANES, parts, strict=True)}

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens; every rank calls it, rank 0 with tensors.

        Raises:
            SessionCorruptError: it does not fit; the layer is as it was, on every rank.
        """
        counts, pages = [0] * self.group.size, torch.empty(0, dtype=torch.int64)
        fault = ""
        if self.group.rank == 0:
            try:
                pages = self._checked(prefix, length, tensors)
                for rank in range(self.group.size):
                    counts[rank] = int(self.shards.of(rank).owns(pages * PAGE).sum())
            except SessionCorruptError as error:
                fault = str(error)
        counts = self.group.broadcast(torch.tensor([int(bool(fault)), *counts])).tolist()
        if counts[0]:
            raise SessionCorruptError(fault or "the saved pages do not fit the model: remove the session and read again")
        native = self.held.pool.native.tensors
        if self.group.rank == 0:
            for rank in range(1, self.group.size):
                chosen = self.shards.of(rank).owns(pages * PAGE)
                self._hand(rank, [pages[chosen], *(tensors[prefix + what][:, chosen] for what in _PLANES)])
            chosen = self.shards.owns(pages * PAGE)
            own = [pages[chosen], *(tensors[prefix + what][:, chosen] for what in _PLANES)]
        else:
            count = counts[1 + self.group.rank]
            like = [torch.empty(count, dtype=torch.int64)]
            like += [
                torch.empty(native[w].shape[0], count, *native[w].shape[2:], dtype=native[w].dtype) for w in _PLANES
            ]
            own = self._take(0, like)
        rows = self.shards.rows(own[0] * PAGE) // PAGE
        held = {"pages": rows} | dict(zip(_PLANES, own[1:], strict=True))
        self.held.restore("", self.shards.count(length), held)
        self.rows.nodes.truncate(0)
        self.rows.total = length

    def _checked(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of the pages that were saved (SessionCorruptError: something does not fit)."""
        native = self.held.pool.native.tensors
        pages = tensors.get(f"{prefix}pages")
        found = [tensors.get(prefix + what) for what in _PLANES]
        other = [name for name in tensors if name.startswith(prefix) and name[len(prefix) :].endswith(".pages")]
        if other or pages is None or any(each is None for each in found):
            raise SessionCorruptError("the saved pages are not of one native type: open the session on one rank")
        whole = pages.dim() == 1 and (pages.numel() == 0 or 0 <= int(pages[0]) <= int(pages[-1]) < -(-length // PAGE))
        shapes = [(native[w].shape[0], pages.numel(), *native[w].shape[2:]) for w in _PLANES]
        same = all(each is not None and tuple(each.shape) == shape for each, shape in zip(found, shapes, strict=True))
        if not whole or not same or not bool((pages.diff() > 0).all()):
            raise SessionCorruptError("the saved pages do not fit the model: remove the session and read again")
        return pages

    def _hand(self, rank: int, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            for piece in _pieces(tensor):
                self.group.send(piece.cpu().contiguous(), rank)

    def _take(self, rank: int, like: Sequence[Tensor]) -> list[Tensor]:
        for tensor in like:
            for piece in _pieces(tensor):
                piece.copy_(self.group.receive(piece.contiguous(), rank))
        return list(like)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return a tensor of pages `[Hkv, n, ...]`, or of numbers, in pieces that are small enough for one message."""
    if tensor.numel() == 0:
        return []
    if tensor.dim() == 1:
        return [tensor]
    each = max(1, _AT_ONCE // max(1, tensor[:, :1].nbytes))
    return tensor.split(each, 1)
