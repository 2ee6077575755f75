"""The states of a hybrid model's recurrent layers beside one context's pages; where all layers attend, nothing.

A state is taken after every chunk. The latest stays, the one of the last commit (so that a question is taken back at no
cost), and one every few pages, to read on from when the context is cut elsewhere. How many pages lie between is set by
bytes: a state is as large as the keys and values of hundreds or thousands of tokens, and checkpoints take at most a
quarter of what pages take. Where a budget is short they are the first to go.
It does not know how tokens are run through the model: contexts do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV
from longspan.kv.states import StateCheckpoints
from longspan.kv.undisturbed import Undisturbed

SHARE = 0.25
"""Bytes that checkpoints may take, as a share of what pages take."""
LEAST = 16
"""Pages between two checkpoints at least."""
_PREFIX = "states."


class Recurrence:
    """The states of one context's recurrent layers."""

    def __init__(
        self,
        spec: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        layers: Sequence[PagedKV],
        chunk: int,
        budget: Budget | None = None,
    ) -> None:
        """Start before the first token.

        Args:
            spec: shape and type of each tensor of a state (others are not kept); empty: there is none to keep.
            layers: the context's pages.
            chunk: tokens that are read together; checkpoints lie where chunks end.
            budget: what states are counted in; None: no limit.
        """
        self.spec = dict(spec)
        self.state_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())
        """Bytes of one state."""
        self._kept: StateCheckpoints | None = None
        if self.spec:
            page_bytes = sum(kv.pool.plane(kv.pool.format.name).page_bytes for kv in layers)
            pages = max(LEAST, math.ceil(self.state_bytes / (SHARE * page_bytes)) if page_bytes else 0)
            unit = max(1, chunk // PAGE)
            self._kept = StateCheckpoints(-(-pages // unit) * unit, budget)

    def __del__(self) -> None:
        """Give the bytes back, as pages do."""
        with suppress(Exception), Undisturbed():  # made only in part, or at the end of the program
            self.truncate(0)

    @property
    def nbytes(self) -> int:
        """Bytes of all states kept."""
        return 0 if self._kept is None else self._kept.nbytes

    @property
    def due(self) -> int:
        """Bytes that the next state adds."""
        return 0 if self._kept is None or self._kept.replaces else self.state_bytes

    @property
    def committed(self) -> int:
        """Tokens that were read for good, where states are kept of them."""
        return 0 if self._kept is None else self._kept.committed

    @property
    def positions(self) -> list[int]:
        """The lengths at which a state is kept, ascending."""
        return [] if self._kept is None else self._kept.positions

    def most(self, size: int) -> int:
        """Return how many of the next `size` tokens may be read before a state must be taken."""
        return size if self._kept is None else min(size, self._kept.next_stop() - self._kept.length)

    def state(self) -> dict[str, Tensor]:
        """Return the latest state, for a forward call to replace; empty: the initial one."""
        return {} if self._kept is None else self._kept.latest() or {}

    def take(self, length: int, state: Mapping[str, Tensor], *, owned: bool = False) -> None:
        """Keep the state after `length` tokens (PoolExhaustedError: there is no room for it; nothing was changed).

        `owned`: nobody else writes to its tensors, which are then not copied.
        """
        if self._kept is not None:
            self._kept.update(length, {name: state[name] for name in self.spec}, owned)

    def commit(self) -> None:
        """Say that the tokens so far were read for good."""
        if self._kept is not None:
            self._kept.commit()

    def truncate(self, length: int) -> int:
        """Cut back, and return how many tokens the state has seen: those from there to `length` must be run again."""
        return length if self._kept is None else self._kept.truncate(min(length, self._kept.length))

    def make_room(self, needed: int) -> None:
        """Give up checkpoints until `needed` bytes and the next state fit the budget, as far as that goes."""
        if self._kept is not None:
            while (left := self._kept.budget.left) is not None and left < needed + self.due:
                if not self._kept.thin():
                    return

    def shrink(self, most: float) -> None:
        """Give up checkpoints until all states take at most so many bytes, as far as that goes."""
        if self._kept is not None:
            while self._kept.nbytes > most and self._kept.thin():
                pass

    def fork(self, budget: Budget | None = None) -> Recurrence:
        """Return one that shares these states (PoolExhaustedError: the fork's budget has no room for them)."""
        other = Recurrence({}, (), PAGE)
        other.spec, other.state_bytes = self.spec, self.state_bytes
        other._kept = None if self._kept is None else self._kept.fork(budget)
        return other

    def tensors(self) -> dict[str, Tensor]:
        """Return all states: what `restore` takes."""
        return {} if self._kept is None else self._kept.tensors(_PREFIX)

    def restore(self, length: int, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens.

        Raises:
            SessionCorruptError: it does not fit the model or the length.
            PoolExhaustedError: the budget has no room for it. In both cases nothing was changed.
        """
        if self._kept is None:
            return
        found = {name: tensors[name] for name in tensors if name.startswith(_PREFIX)}
        states: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
        for name, tensor in found.items():
            at, _, part = name.removeprefix(_PREFIX).partition(".")
            states.setdefault(at, {})[part] = (tuple(tensor.shape), tensor.dtype)
        if any(state != self.spec for state in states.values()):
            raise SessionCorruptError("the saved states do not fit the model: remove the session and read again")
        self._kept.restore(_PREFIX, length, {name: tensor.to(device) for name, tensor in found.items()})
