"""Keys rotated to their own positions, kept beside the pages for readers of the whole context.

Rotating every key for every token would cost more than attention itself. The copy only ever grows at its end, and
contexts that were forked share it until one of them needs other rows than it holds. Where only a window is read, a copy
of the window alone is kept, which begins anew further on once too much lies before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longspan.kv.base import PAGE

_BEHIND = 16 * PAGE
"""Rows before a window that are kept while it moves on: then it is rotated as a whole again, two keys a token."""


class _Rows:
    """Rows `[1, Hkv, capacity, D]`, how many of them are written, and how many contexts read them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.written, self.readers = rows, 0, 1


class _Columns:
    """Keys channel by channel, `[1, Hkv, D, capacity]`, of one context alone."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.length = 0

    def read(self, stop: int, lacking: Callable[[int, int], Tensor]) -> Tensor:
        if self.rows is None or self.length < stop:
            fresh = lacking(self.length, stop)
            if self.rows is None or self.rows.shape[3] < stop:
                capacity = -(-max(4 * PAGE, stop + stop // 2) // PAGE) * PAGE
                with torch.inference_mode(False):  # as in `Plane`: it is written to outside of inference mode too
                    grown = fresh.new_empty(*fresh.shape[:3], capacity)
                if self.rows is not None:
                    grown[..., : self.length] = self.rows[..., : self.length]
                self.rows = grown
            self.rows[..., self.length : stop] = fresh
            self.length = stop
        return self.rows[..., :stop]


class Mirror:
    """One context's rotated keys, as far as they were asked for."""

    def __init__(self) -> None:
        """Start empty."""
        self._rows: _Rows | None = None
        self._wanted = 0
        """Rows that there will be room for from the first on."""
        self.length = 0
        self._near: tuple[int, Mirror] | None = None
        """The first token of a window, and its rows from there on."""
        self._columns: dict[bool, _Columns] = {}
        """Keys channel by channel, by whether they are rotated: forks make their own."""

    @property
    def held(self) -> Tensor:
        """The memory of the rows, `[1, Hkv, capacity, D]` without gaps: only the first `length` mean anything."""
        assert self._rows is not None, "nothing was read yet"
        return self._rows.rows

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, room for more and those of a window included."""
        near = 0 if self._near is None else self._near[1].nbytes
        return near + (0 if self._rows is None else self._rows.rows.nbytes)

    def read(self, stop: int, rotated: Callable[[int, int], Tensor]) -> Tensor:
        """Return the keys `[1, Hkv, stop, D]` of the first tokens; `rotated(start, stop)` gives those that lack."""
        if self._rows is None or self.length < stop:
            self._extend(stop, rotated(self.length, stop))
        assert self._rows is not None
        return self._rows.rows[:, :, :stop]

    def near(self, start: int, stop: int, rotated: Callable[[int, int], Tensor]) -> Tensor:
        """Return the keys `[1, Hkv, stop - start, D]` of a window that moves on from one call to the next.

        They are kept apart from those that `read` returns; `rotated` as there.
        """
        at, rows = self._near or (start, Mirror())
        if not at <= start <= at + rows.length or start - at > _BEHIND:
            rows.clear()
            at = start
        self._near = at, rows
        return rows.read(stop - at, lambda first, last: rotated(at + first, at + last))[:, :, start - at :]

    def columns(self, stop: int, rotated: bool, lacking: Callable[[int, int], Tensor]) -> Tensor:
        """Return the keys `[1, Hkv, D, stop]` of the first tokens, channel by channel.

        Args:
            stop: how many tokens.
            rotated: which keys these are, the rotated or the unrotated.
            lacking: gives `[1, Hkv, D, n]` of the tokens `start .. stop - 1`, those that are not here yet.
        """
        return self._columns.setdefault(rotated, _Columns()).read(stop, lacking)

    def follows(self, length: int) -> bool:
        """Whether a row for the token `length` can be added where it is: all before it were asked for, and it fits."""
        kept = self._rows
        if kept is None or self.length != length or kept.rows.shape[2] == length:
            return False
        return kept.readers == 1 or kept.written == length

    def add(self, row: Tensor) -> None:
        """Add the rotated key `[1, Hkv, 1, D]` of the next token, where `follows` says so."""
        assert self._rows is not None, "nothing was read yet"
        self._rows.rows[:, :, self.length] = row[:, :, 0]
        self.length += 1
        self._rows.written = self.length

    def truncate(self, length: int) -> None:
        """Forget every row from `length` on."""
        self.length = min(self.length, length)
        for columns in self._columns.values():
            columns.length = min(columns.length, length)
        if self._near is not None:
            at, rows = self._near
            rows.truncate(max(0, length - at))

    def fork(self) -> Mirror:
        """Return a mirror that shares these rows."""
        other = Mirror()
        if self._rows is not None:
            self._rows.readers += 1
            other._rows, other.length = self._rows, self.length
        if self._near is not None:
            other._near = self._near[0], self._near[1].fork()
        return other

    def clear(self) -> None:
        """Forget every row and give the memory back."""
        if self._rows is not None:
            self._rows.readers -= 1
        if self._near is not None:
            self._near[1].clear()
        self._rows, self.length, self._near, self._columns = None, 0, None, {}

    def advance(self, stop: int) -> None:
        """Count the rows up to `stop` as held, which the caller writes; those before were read already."""
        assert self._rows is not None, "nothing was read yet"
        self._rows = self._room(self._rows, stop, self._rows.rows)
        self.length = self._rows.written = stop

    def reserve(self, capacity: int) -> None:
        """Have room for so many rows: now, if any were read, else as soon as one is."""
        self._wanted = capacity
        if self._rows is not None:
            self._rows = self._room(self._rows, capacity, self._rows.rows, exactly=True)

    def _extend(self, stop: int, fresh: Tensor) -> None:
        kept = self._rows = self._room(self._rows, stop, fresh)
        kept.rows[:, :, self.length : stop] = fresh
        self.length = kept.written = stop

    def _room(self, kept: _Rows | None, stop: int, like: Tensor, *, exactly: bool = False) -> _Rows:
        """Return rows with room up to `stop`, in which no other context has written behind our own."""
        # Rows behind `length` may be another context's, if it was forked from this one and went on.
        others = kept is not None and kept.readers > 1 and kept.written != self.length
        if kept is not None and not others and kept.rows.shape[2] >= stop:
            return kept
        exactly = exactly or stop <= self._wanted
        capacity = max(self._wanted, stop if exactly else max(4 * PAGE, stop + stop // 2))
        capacity = -(-capacity // PAGE) * PAGE  # whole pages
        with torch.inference_mode(False):  # as in `Plane`: it is written to outside of inference mode too
            grown = _Rows(like.new_empty(1, like.shape[1], capacity, like.shape[3]))
        if kept is not None:
            grown.rows[:, :, : self.length] = kept.rows[:, :, : self.length]
            grown.written = self.length
            kept.readers -= 1
        return grown
