"""What a mechanism remembers of tokens whose keys and values it reads no more: a state beside one layer's pages.

A state is a set of named tensors and the number of tokens that it has seen. The latest state is kept and the one of the
last commit: cut back to any length that was not committed yet, a context finds a state at or before it, and the keys
from there on are still in its pages. What was committed and dropped comes back as little as dropped pages do.
Whose states they are is kept with them, so that no mechanism, and none with other options, reads another's.
It does not know what the tensors mean: mechanisms do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError
from longspan.kv.budget import Budget
from longspan.kv.states import StateCheckpoints
from longspan.kv.undisturbed import Undisturbed

_NEVER = 2**40
"""Pages between checkpoints that stay for good: further apart than any context is long."""


class LayerMemory:
    """The states of one layer of one context (B = 1)."""

    def __init__(
        self,
        owner: object,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        budget: Budget | None = None,
    ) -> None:
        """Start before the first token, where nothing is remembered.

        Args:
            owner: the mechanism whose states these are; another that equals it may read them too.
            shapes: the tensors of a state.
            dtype: their float type.
            device: where they lie.
            budget: what their bytes are counted in; None: no limit.
        """
        self.owner, self.shapes, self.dtype, self.device = owner, dict(shapes), dtype, device
        self._states = StateCheckpoints(_NEVER, budget)

    @property
    def length(self) -> int:
        """Number of tokens that the latest state has seen."""
        return self._states.length

    @property
    def nbytes(self) -> int:
        """Bytes of the states kept: two at most."""
        return self._states.nbytes

    def latest(self) -> dict[str, Tensor] | None:
        """Return the latest state (not to be written to); None: no token was seen."""
        return self._states.latest()

    def update(self, length: int, state: Mapping[str, Tensor]) -> None:
        """Take a copy of the state after `length` tokens, more than before, as the latest.

        Raises:
            PoolExhaustedError: the budget has no room for it; nothing was changed.
        """
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == self.shapes, "not such a state"
        with Undisturbed():
            self._states.update(length, state)

    def commit(self) -> None:
        """Say that the tokens so far were read for good: the latest state stays until the next commit."""
        self._states.commit()

    def truncate(self, length: int) -> None:
        """Forget every state that has seen more than `length` tokens."""
        self._states.truncate(min(length, self.length))

    def fork(self, budget: Budget | None = None) -> LayerMemory:
        """Return a memory that shares these states (PoolExhaustedError: the fork's budget has no room for them)."""
        other = LayerMemory(self.owner, self.shapes, self.dtype, self.device)
        other._states = self._states.fork(budget)
        return other

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return all states, `{prefix}{length}.{name}`: what `restored` takes."""
        return self._states.tensors(prefix)

    def restored(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> LayerMemory:
        """Return a memory of the same kind that holds what `tensors` returned; this one stays as it is.

        Args:
            prefix: of the names.
            length: tokens of the context; no state may have seen more.
            tensors: by name; others are left out.

        Raises:
            SessionCorruptError: states that lack a tensor, or whose tensors have another shape or type.
            PoolExhaustedError: the budget has no room for them.
        """
        found = {name: tensors[name] for name in tensors if name.startswith(prefix)}
        parts: dict[int, set[str]] = {}
        for name, tensor in found.items():
            at, _, part = name.removeprefix(prefix).partition(".")
            fits = at.isdigit() and 0 < int(at) <= length and self.shapes.get(part) == tuple(tensor.shape)
            if not fits or tensor.dtype != self.dtype:
                raise _unfit()
            parts.setdefault(int(at), set()).add(part)
        if any(names != set(self.shapes) for names in parts.values()):
            raise _unfit()
        other = LayerMemory(self.owner, self.shapes, self.dtype, self.device, self._states.budget)
        placed = {name: tensor.to(self.device) for name, tensor in found.items()}
        other._states.restore(prefix, max(parts, default=0), placed)
        return other


def _unfit() -> SessionCorruptError:
    return SessionCorruptError("the saved memory does not fit the model: remove the session and read again")
