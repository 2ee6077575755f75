"""The context that keeps every layer's keys and values, and attends by its mechanism.

It knows how tokens are read and taken back; what is held, and within which bytes, is `kv_layers.py`'s, and steps of
decode are `kv_steps.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.attention.evicting import Evicting
from longspan.engine import memory_plan
from longspan.engine.asked_copy import AskedCopy
from longspan.engine.contexts import Most, Tick, kv_head, restore_layers
from longspan.engine.kept_layers import KeptLayers
from longspan.engine.kv_steps import KVSteps
from longspan.engine.readers import Asked, Attending
from longspan.engine.repetition import repeat
from longspan.engine.resolutions import demoted
from longspan.engine.stepper import AHEAD
from longspan.errors import PoolExhaustedError
from longspan.hf.attention import Reader
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import RetrievalHeads


class KVContext(KVSteps):
    """Keeps every layer's keys and values."""

    def fork(self, budget: Budget | None = None) -> KVContext:
        """Return a context that has read the same tokens and shares every page until one of the two writes to it.

        Args:
            budget: the fork's own, under the same root; None: like this context's.

        Raises:
            PoolExhaustedError: what it would refer to is more than its budget has left.
        """
        if budget is None:
            own = self.budget
            budget = own if own.parent is None else Budget(own.limit, own.name, own.parent)
        other = copy.copy(self)
        other.tokens, other.budget, other.layers, other._stepper = list(self.tokens), budget, [], None
        other.recurrence = self.recurrence.fork(budget)
        other.noted = None if self.noted is None else self.noted.fork()
        try:
            for kv in self.layers:
                other.layers.append(kv.fork(budget))
            other.kept = None if self.kept is None else self.kept.fork(budget)
            other._asked = None if self._asked is None else self._asked.fork(budget)
            other._masses = copy.deepcopy(self._masses)
            for kv, mass in zip(other.layers, other._masses, strict=False):
                kv.mass = mass
        except BaseException:
            for kv in other.layers:
                kv.free()
            raise
        return other

    @property
    def answers_by(self) -> Mechanism:
        """The mechanism that an answer attends by, as it was set for the question."""
        return self.mechanism if self.answers_from is None else self.answers_from.mechanism

    @property
    def answers_from(self) -> KeptLayers | None:
        """What an answer reads where keys are evicted: a question's copy, or what the document left; None: `layers`."""
        return self.kept if self._asked is None else self._asked.layers

    def answering(self) -> Reader:
        """See `KVSteps`."""
        return self._reader(self.mechanism, for_good=False)

    def evict_by(self, mechanism: Evicting, nbytes: int | None = None) -> None:
        """Evict by another mechanism, which would have read the documents alike (`Evicting.unevicted`), from now on.

        Args:
            mechanism: decides what stays.
            nbytes: that all layers may take (`KeptLayers.shrink`); None: what the mechanism keeps.
        """
        assert self.kept is not None, "only what evicts has a context of its own"
        self.mechanism = self.kept.mechanism = mechanism
        self._commit()
        if nbytes is None or self.kept.whole:
            self._finish()
        else:
            self.kept.shrink(self.length, nbytes)

    def extending(self, tokens: Sequence[int], most: Most | None = None) -> Iterator[int]:
        """See `Context`; a question that evicted and was not taken back is read again, for good."""
        if self._asked is not None:
            again = self.tokens[self._committed :]
            self.truncate(self._committed)
            yield from super().extending(again, most)
        self.reserve(self.length + len(tokens) + AHEAD * PAGE)
        yield from super().extending(tokens, most)

    def stepping(self, tokens: Sequence[int], most: Most | None = None) -> Iterator[tuple[int, Tensor | None]]:
        """See `Context`; the first tokens after documents are the question, which may evict on a copy."""
        asks = self.kept is not None and self.kept.whole and self.length == self._committed
        if self.kept is not None and asks:
            self._asked = AskedCopy(self.kept, len(tokens), self.length)
        for count, out in super().stepping(tokens, most):
            if out is not None and asks and self._asked is not None:
                self._asked.evict(self.length)
            yield count, out

    def _within(self, count: int, most: Most | None) -> int:
        # What evicts, or writes pages down, does so by chunks: what is held must not depend on who else is served.
        by_chunks = self.kept is not None or any(kv.pool.format is not kv.pool.native.format for kv in self.layers)
        return count if by_chunks else super()._within(count, most)

    def hold(self, tokens: Sequence[int], state: Mapping[str, Tensor]) -> None:
        """Count tokens as read for good, whose keys and values the caller put into every layer's pages.

        Args:
            tokens: their ids.
            state: the recurrent states after them; empty where all layers attend.
        """
        length = self.length + len(tokens)
        assert all(kv.length == length for kv in self.layers), "every layer holds them"
        self.recurrence.restore(
            length, {f"states.{length}.{name}": tensor for name, tensor in state.items()}, self.model.device
        )
        self.tokens.extend(tokens)
        self._commit()

    def truncate(self, length: int) -> None:
        """See `Context.truncate`; of a question that evicted, what stays is read again."""
        cut = self._asked is not None and self._committed < length < self._asked.until
        again = self.tokens[self._committed : length] if cut else []
        super().truncate(length - len(again))
        if again:
            self.step(again)

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`."""
        before = self.length
        asked = Asked(self._reader(self.mechanism, for_good=False), heads)
        if self._moves:
            self._settle(len(question))
        try:
            self.model.forward(question, asked, state=self.recurrence.state())
        finally:
            self.truncate(before)
        if self.kept is not None:
            return self.kept.mass(asked.queries, heads, before)
        start, stop = self.dropped(before)
        # The first page that is held whole again; nothing before it is asked for.
        first = min(-(-stop // PAGE) * PAGE, before) if stop > start else 0
        keys = {
            head: self.layers[head[0]].known_keys(first, before)[0, kv_head(self.model, head)] for head in heads.heads
        }
        found = token_mass(asked.queries, keys, sinks=heads.sinks if first == 0 else 0)
        return torch.nn.functional.pad(found, (first, 0))

    @property
    def untold(self) -> str:
        """Why it can't be told which tokens an answer reads; empty: it can."""
        if any(kv.memory is not None for kv in self.layers):
            return f"{self.mechanism.name} remembers older tokens together, and reads none of them alone"
        return ""

    def restore(self, tokens: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """See `Context`."""
        self.recurrence.restore(len(tokens), tensors, self.model.device)
        try:
            restore_layers(self._layers(), len(tokens), tensors)
        except PoolExhaustedError:
            if not self._moves:
                raise
            # It was read under a larger budget, or none.
            for kv in self.layers:
                kv.free()
            self._committed = len(tokens)
            needs = self._needs(len(tokens), 1)
            restore_layers(
                self.layers, len(tokens), demoted(self.layers, tensors, self._page_bytes(), needs, self.budget)
            )
        self.tokens = list(tokens)
        self._committed = self._repeated = self.length
        if not self.budget.limited:
            # What a budget had demoted need not stay so without one.
            for kv in self.layers:
                kv.promote(sorted(kv.exact))

    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        before = self.length
        reader = self._reader(mechanism or self.mechanism, for_good=mechanism is not None)
        if self.kept is not None and mechanism is not None:
            self._commit()  # an interruption may have come between reading and this
            if self.kept.crowded(len(chunk), self._room):
                self._repeat()
            self.kept.make_room(before, len(chunk), self._room)
        self._make_room(len(chunk))
        state = self.recurrence.state()
        steps = self._steps() if len(chunk) == logits == 1 and mechanism is None else None
        out: Tensor | None
        try:
            if steps is not None:
                _, last, state = steps.run(chunk[0], 1, state)
                out = last.unsqueeze(0)
                if self.noted is not None:
                    self.noted.after(steps)
            else:
                out = self.model.forward(chunk, reader, logits=logits, state=state)
            self._count(chunk, state, owned=steps is not None)
        except BaseException:
            if self.length == before:
                self.truncate(before)
            raise
        return out

    def _cut(self, length: int) -> None:
        super()._cut(length)
        if self._asked is not None:
            if length > self._committed:
                self._asked.truncate(length)
            else:
                self._asked.free()
                self._asked = None
        self._committed, self._repeated = min(self._committed, length), min(self._repeated, length)
        for mass in self._masses:
            mass.truncate(length // PAGE)

    def _commit(self) -> None:
        super()._commit()
        self._committed = self.length
        if self._planned is not None:
            self.recurrence.shrink(memory_plan.STATES)

    def _most(self) -> int:
        most = super()._most()
        return most if self.kept is None else min(most, self.kept.next_stop(self.length) - self.length)

    def _finish(self) -> None:
        if self.kept is not None:
            self._commit()
            self._repeat()
            self.kept.finish(self.length, self._room)

    @property
    def _room(self) -> int:
        """Tokens that must find room beside what is kept: a chunk, and a repetition of one where there is any."""
        assert self.kept is not None, "only what evicts makes room so"
        return self.chunk * (2 if self.kept.mechanism.repeats else 1)

    def _repeat(self) -> None:
        """Have what was committed repeated, where the mechanism evicts by that (`repetition.py`)."""
        assert self.kept is not None, "only what evicts is repeated"
        if self.kept.mechanism.repeats:
            done = repeat(self.model, self.kept, self.tokens, self._repeated, self.chunk, self.recurrence.state)
            self._repeated = done

    def _reader(self, mechanism: Mechanism, *, for_good: bool) -> Reader:
        """Return what happens in every layer when tokens are read, documents' or those that are taken back."""
        reader: Reader = Attending(self.layers, mechanism, self.hints, self.model.trained)
        if self._asked is not None:
            reader = self._asked.reader()
        elif self.kept is not None:
            reader = self.kept.reader(learn=for_good)
        return reader if self.noted is None else self.noted.over(reader)
