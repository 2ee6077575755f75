"""Recurrent state (Mamba's SSM and convolution state) checkpointed at page boundaries.

Keys can be cut back to any length; a recurrent state can't be run backwards. So states are kept every few pages, beside
the latest and the committed one, and cutting back goes to the nearest state at or before the wanted length and says
where to run tokens again from. Save, restore, fork and taking a question back then hold on hybrid models too.
It does not know models: states are named tensors of any shape and type, and what is kept is a copy.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from longspan.errors import SessionCorruptError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget


class _State:
    """One state, and how many contexts hold it."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.holders = tensors, 1
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())


class StateCheckpoints:
    """The states of one context's recurrent layers, by the number of tokens that they have seen."""

    def __init__(self, every: int = 16, budget: Budget | None = None) -> None:
        """Start before the first token, where the state is the model's initial one and none is kept.

        Args:
            every: pages between two checkpoints.
            budget: what their bytes are counted in; None: no limit.
        """
        if every < 1:
            raise UsageError(f"every={every} is too small: checkpoints are at least a page apart")
        self.every, self.budget = every, Budget() if budget is None else budget
        self._kept: dict[int, _State] = {}  # ascending; those not at a boundary are the latest one or the committed one
        self._length = self._committed = 0

    @property
    def length(self) -> int:
        """Number of tokens that the latest state has seen."""
        return self._length

    @property
    def committed(self) -> int:
        """Number of tokens that the state of the last commit has seen."""
        return self._committed

    @property
    def positions(self) -> list[int]:
        """The lengths at which a state is kept, ascending; 0, where it is the initial one, left out."""
        return list(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the states kept."""
        return sum(state.nbytes for state in self._kept.values())

    @property
    def replaces(self) -> bool:
        """Whether the next state takes the place of the latest one; else both stay."""
        return self._length in self._kept and not self._lasting(self._length)

    def next_stop(self) -> int:
        """Return the next length at which a checkpoint is due: a chunk must not run past it before `update`."""
        step = self.every * PAGE
        return (self._length // step + 1) * step

    def update(self, length: int, state: Mapping[str, Tensor], owned: bool = False) -> None:
        """Take the state after `length` tokens as the latest one.

        The one before it is kept if it lies at a boundary or was committed.

        Args:
            length: tokens that it has seen.
            state: its tensors.
            owned: whether nobody else writes to them, so that they need not be copied.

        Raises:
            PoolExhaustedError: the budget has no room for it; nothing was changed.
        """
        assert self._length < length <= self.next_stop(), f"a state at {length} after {self._length}"
        old = self._length if self.replaces else None
        size = sum(tensor.nbytes for tensor in state.values())
        self._charge(size, [] if old is None else [old])
        if old is not None:
            self._kept.pop(old).holders -= 1
        held = {name: tensor.detach() if owned else tensor.detach().clone() for name, tensor in state.items()}
        self._kept[length] = _State(held)
        self._length = length

    def commit(self) -> None:
        """Say that the tokens so far were read for good: the latest state stays until the next commit."""
        before, self._committed = self._committed, self._length
        if before in self._kept and not self._lasting(before):
            self._forget([before])

    def latest(self) -> dict[str, Tensor] | None:
        """Return the latest state (not to be written to); None: the model's initial one."""
        state = self._kept.get(self._length)
        return None if state is None else dict(state.tensors)

    def truncate(self, length: int) -> int:
        """Cut back to the newest state that has seen at most `length` tokens.

        Returns:
            How many tokens that state has seen: those from there up to `length` must be run again.
        """
        if not 0 <= length <= self._length:
            raise UsageError(f"a state of {self._length} tokens can't be cut to {length}")
        self._forget([at for at in self._kept if at > length])
        self._length = max(self._kept, default=0)
        self._committed = min(self._committed, self._length)
        return self._length

    def thin(self) -> bool:
        """Give up one checkpoint, of those closest together the oldest; False: only what must stay is left.

        The latest state stays, and the committed one.
        """
        kept = [0, *self._kept]
        gaps = {at: after - before for before, at, after in zip(kept, kept[1:], kept[2:], strict=False)}
        spare = [at for at in gaps if at != self._committed]
        if spare:
            self._forget([min(spare, key=lambda at: gaps[at])])
        return bool(spare)

    def fork(self, budget: Budget | None = None) -> StateCheckpoints:
        """Return checkpoints that share these states (PoolExhaustedError: the fork's budget has no room for them)."""
        other = StateCheckpoints(self.every, self.budget if budget is None else budget)
        other.budget.charge(self.nbytes, 0)
        for state in self._kept.values():
            state.holders += 1
        other._kept, other._length, other._committed = dict(self._kept), self._length, self._committed
        return other

    def free(self) -> None:
        """Give every state back."""
        self.truncate(0)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return all states, `{prefix}{length}.{name}`: what `restore` takes."""
        return {
            f"{prefix}{at}.{name}": tensor for at, state in self._kept.items() for name, tensor in state.tensors.items()
        }

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, the latest state being that after `length` tokens.

        Raises:
            SessionCorruptError: there is no such state, or states differ in what they hold.
            PoolExhaustedError: the budget has no room for them. In both cases nothing was changed.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            at, _, part = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and at.isdigit() and part:
                found.setdefault(int(at), {})[part] = tensor
        shapes = [{part: (tensor.shape, tensor.dtype) for part, tensor in state.items()} for state in found.values()]
        if max(found, default=0) != length or any(shape != shapes[0] for shape in shapes) or 0 in found:
            raise SessionCorruptError("the saved states do not fit their tokens: remove the session and read again")
        made = {at: _State({part: t.clone() for part, t in found[at].items()}) for at in sorted(found)}
        self._charge(sum(state.nbytes for state in made.values()), list(self._kept))
        for state in self._kept.values():
            state.holders -= 1
        self._kept, self._length, self._committed = made, length, length

    def _lasting(self, at: int) -> bool:
        return at % (self.every * PAGE) == 0 or at == self._committed

    def _charge(self, more: int, gone: list[int]) -> None:
        states = [self._kept[at] for at in gone]
        memory = more - sum(state.nbytes for state in states if state.holders == 1)
        self.budget.charge(more - sum(state.nbytes for state in states), memory)

    def _forget(self, gone: list[int]) -> None:
        self._charge(0, gone)
        for at in gone:
            self._kept.pop(at).holders -= 1
