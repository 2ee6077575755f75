"""A context's steps of decode: many without a look at any in between, or one together with those of other contexts.

It does not know who steps several contexts together (`serving/batch.py`), nor how documents are read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from longspan.engine.kv_layers import KVLayers
from longspan.engine.stepper import TOGETHER, Stepper
from longspan.hf.attention import Reader


class KVSteps(KVLayers):
    """Steps with the keys and values of every layer."""

    @abstractmethod
    def answering(self) -> Reader:
        """Return what reads tokens that are not counted: whoever ran it cuts the context back to its own length."""

    def rehearse(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens as documents are read, but to be taken back (`truncate`); returns logits as `step` does."""
        out: Tensor | None = None
        done = 0
        while done < len(tokens):
            chunk = list(tokens[done : done + self.recurrence.most(self.chunk)])
            done += len(chunk)
            by = self.reads_by(self.length + len(chunk))
            out = self._add(chunk, logits=int(done == len(tokens)), mechanism=by)
        assert out is not None, "rehearse() needs at least one token"
        return out[-1]

    @property
    def runs(self) -> bool:
        """Whether `run` serves."""
        return self._steps() is not None

    def run(self, token: int, count: int) -> list[int]:
        """Read a token, then `count - 1` times the likeliest next one, without looking at any in between.

        The tokens may be taken back, as those of `step`. Whoever calls has asked `runs`.

        Returns:
            The `count` tokens that followed, of which the last was not read.
        """
        out: list[int] = []
        while len(out) < count:
            steps = self._steps()
            assert steps is not None, "runs was not asked"
            before, size = self.length, self.recurrence.most(min(count - len(out), TOGETHER))
            try:
                said, _, state = steps.run(token, size, self.recurrence.state())
                found = said.tolist()
                self._count([token, *found[:-1]], state, owned=True)
            except BaseException:
                if self.length == before:
                    self.truncate(before)
                raise
            out += found
            token = found[-1]
        return out

    def _steps(self) -> Stepper | None:
        """Return what decodes one token after another without the model's modules; None: nothing can."""
        if self.kept is not None or self._moves or self.hints.chosen_pages:
            return None
        if not self.layers or not Stepper.serves(self.model, self.layers, self.mechanism):
            return None
        if self._stepper is None or self._stepper.mechanism != self.mechanism:
            self._stepper = Stepper(self.model, self.layers, self.mechanism)
        if self.noted is not None:
            self._stepper.note(self.noted.layers)
        return self._stepper

    @property
    def steps_alone(self) -> bool:
        """Whether a token is read by `step` alone, in no batch with other contexts'."""
        return False

    def reads_rows(self, n: int) -> bool:
        """Whether the next token, the `n`-th, attends to every key and value, as it is held, and to nothing else."""
        return (
            self.kept is None
            and self.mechanism.reads_all_of(n)
            and not self.recurrence.spec
            and not self._moves
            and self.model.device.type == "cpu"
            and all(
                kv.pages.plain
                and kv.memory is None
                and not kv.blocks.kept
                and kv.pool.format is kv.pool.native.format
                and kv.window is None
                for kv in self.layers
            )
        )

    def take_rows(self, tokens: Sequence[int], rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Count tokens as read, to be taken back as those of `step`, whose keys and values were computed elsewhere.

        Args:
            tokens: their ids.
            rows: each layer's unrotated keys `[1, Hkv, T, D]` and values.

        Raises:
            PoolExhaustedError: the budget has no room for them; nothing was added.
        """
        try:
            for kv, (k, v) in zip(self.layers, rows, strict=True):
                kv.append(k, v)
            self._count(list(tokens), {})
        except BaseException:
            self.undo_step()
            raise

    def begin_step(self) -> tuple[Reader, dict[str, Tensor]]:
        """Return what reads one more token, and the recurrent state before it; `end_step` or `undo_step` must follow.

        Raises:
            PoolExhaustedError: the budget has no room for it.
        """
        self._make_room(1)
        return self.answering(), dict(self.recurrence.state())

    def end_step(self, token: int, state: dict[str, Tensor]) -> None:
        """Count the token as read, and the state after it as this context's own."""
        self._count([token], state, owned=True)

    def undo_step(self) -> None:
        """Take back what was read of a token, or of several, that were not counted."""
        self.truncate(self.length)
