"""Decode steps of many contexts as one: products read the weights once for all of them, attention keeps them apart.

Contexts of different length, mechanism and kind come and go between any two steps. Short ones that read every row, as
windows do that hold all of them, lie side by side in stacks (`stack.py`); every other one attends to its token through
a reader of its own. A context that fails, for lack of pages say, leaves the others as they are. It does not know
sampling or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.engine.kv_context import KVContext
from longspan.engine.serving.stack import Stack, Step
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel

STACKED = 4096
"""Tokens up to which a context may lie in a stack: beyond it reading takes longer than the calls that it saves."""
_LEAST = 256


class Batch:
    """Contexts that read one token each in a step."""

    def __init__(self, model: CausalModel) -> None:
        """Start without any."""
        self.model = model
        self._stacks: dict[int, Stack] = {}
        """By the tokens that a slot has room for."""
        self._where: dict[int, Stack] = {}
        """Stacks by the identity of the contexts that lie in them."""

    @torch.inference_mode()
    def step(self, contexts: Sequence[KVContext], tokens: Sequence[int]) -> tuple[Tensor, dict[int, Exception]]:
        """Read a token after each context.

        Args:
            contexts: each once.
            tokens: one for each.

        Returns:
            float32 logits `[B, V]`, and by place the errors of contexts that could not read theirs: these are as long
            as they were, or shorter by what a stack held of them.
        """
        if len(contexts) == 1 and not self._stackable(contexts[0]):
            try:
                return contexts[0].step(list(tokens)).unsqueeze(0), {}
            except Exception as error:
                return torch.empty(1, 0), {0: error}
        alone = [place for place, context in enumerate(contexts) if context.steps_alone]
        if alone:
            together = [place for place in range(len(contexts)) if place not in alone]
            return self._one_by_one(contexts, tokens, [*([together] if together else []), *([i] for i in alone)])
        places = {id(context): place for place, context in enumerate(contexts)}
        lost: dict[int, Exception] = {}
        for place, context in enumerate(contexts):
            try:
                self._put(context)
            except Exception as error:  # its pages have no room for what a stack held
                lost[place] = error
        if lost:
            going = [place for place in range(len(contexts)) if place not in lost]
            logits, failed = self._one_by_one(contexts, tokens, [going] if going else [])
            return logits, failed | lost
        stacks = [stack for stack in self._stacks.values() if stack.contexts]
        order = [places[id(context)] for stack in stacks for context in stack.contexts]
        assert len(set(order)) == len(order), "contexts that are not stepped have left"
        singles = [place for place, context in enumerate(contexts) if id(context) not in self._where]
        apart = _Apart([contexts[place] for place in singles])
        failed = {singles[row]: error for row, error in apart.failed.items()}
        order += [place for place in singles if place not in failed]
        if not order:
            return torch.empty(len(contexts), 0), failed
        reader = _Together([stack.begin() for stack in stacks], [len(stack.contexts) for stack in stacks], apart)
        read = [tokens[place] for place in order]
        try:
            rows = self.model.step(read, reader, apart.states)
        except BaseException:
            apart.undo()
            raise
        start = 0
        for stack in stacks:
            stop = start + len(stack.contexts)
            failed |= {order[start + slot]: lack for slot, lack in stack.end(read[start:stop])}
            start = stop
        failed |= {singles[row]: lack for row, lack in apart.end(read[start:]).items()}
        if order == list(range(len(contexts))):
            return rows, failed
        logits = rows.new_empty(len(contexts), rows.shape[1])
        logits[order] = rows
        return logits, failed

    def _one_by_one(
        self, contexts: Sequence[KVContext], tokens: Sequence[int], groups: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Step groups of contexts, given by their places, one after the other; the result is that of `step`."""
        found: dict[int, Tensor] = {}
        failed: dict[int, Exception] = {}
        for group in groups:
            rows, lacks = self.step([contexts[place] for place in group], [tokens[place] for place in group])
            failed |= {group[row]: error for row, error in lacks.items()}
            found |= {place: rows[row] for row, place in enumerate(group) if row not in lacks}
        if not found:
            return torch.empty(len(contexts), 0), failed
        like = next(iter(found.values()))
        return torch.stack([found.get(place, like.new_zeros(like.shape)) for place in range(len(contexts))]), failed

    def length(self, context: KVContext) -> int:
        """Return the number of tokens that a context has read, whether its pages hold them yet or not."""
        stack = self._where.get(id(context))
        return context.length if stack is None else stack.length(stack.contexts.index(context))

    def leave(self, context: KVContext) -> None:
        """Have a context's own pages hold all it has read, and take it out (PoolExhaustedError: they have no room)."""
        stack = self._where.pop(id(context), None)
        if stack is not None:
            stack.leave(stack.contexts.index(context))
            if not stack.contexts:
                del self._stacks[stack.room]

    def _stackable(self, context: KVContext) -> bool:
        length = self.length(context)
        return length < STACKED and context.reads_rows(length + 1)

    def _put(self, context: KVContext) -> None:
        """Have a context in the stack of its size, or in none."""
        stack = self._where.get(id(context))
        if stack is not None:
            length = stack.length(stack.contexts.index(context))
            if length < stack.room and context.mechanism.reads_all_of(length + 1):
                return
        self.leave(context)
        if self._stackable(context):
            room = _LEAST
            while room <= context.length:
                room *= 2
            stack = self._stacks.setdefault(room, Stack(self.model, room))
            stack.join(context)
            self._where[id(context)] = stack


class _Apart:
    """Contexts that attend through readers of their own."""

    def __init__(self, contexts: Sequence[KVContext]) -> None:
        """Make room for a token in each."""
        self.failed: dict[int, Exception] = {}
        self._rows: list[tuple[int, KVContext]] = []
        self._readers: list[Reader] = []
        self.states: list[dict[str, Tensor]] = []
        self._broken: dict[int, Exception] = {}
        for row, context in enumerate(contexts):
            try:
                reader, state = context.begin_step()
            except Exception as error:
                self.failed[row] = error
                continue
            self._rows.append((row, context))
            self._readers.append(reader)
            self.states.append(state)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`; what fails reads zeros from then on."""
        parts = []
        for at, (reader, *part) in enumerate(zip(self._readers, *(x.split(1) for x in (q, k, v)), strict=True)):
            if at not in self._broken:
                try:
                    parts.append(reader.attend(layer, *part, scale))
                    continue
                except Exception as error:
                    self._broken[at] = error
            parts.append(q.new_zeros(1, q.shape[1], 1, v.shape[3]))
        return torch.cat(parts)

    def end(self, tokens: Sequence[int]) -> dict[int, Exception]:
        """Count each context's token; returns the errors, by the place of the context."""
        for at, ((row, context), token, state) in enumerate(zip(self._rows, tokens, self.states, strict=True)):
            error = self._broken.get(at)
            if error is None:
                try:
                    context.end_step(token, state)
                except Exception as raised:
                    error = raised
            if error is not None:
                context.undo_step()
                self.failed[row] = error
        return self.failed

    def undo(self) -> None:
        """Take back what a step that failed as a whole has left in the contexts."""
        for _, context in self._rows:
            context.undo_step()


class _Together:
    """The reader of a step: rows of each stack first, then those that attend apart."""

    def __init__(self, steps: Sequence[Step], sizes: Sequence[int], apart: _Apart) -> None:
        """Take the stacks' steps, how many rows each has, and the others."""
        self._steps, self._sizes, self._apart = steps, list(sizes), apart

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        others = q.shape[0] - sum(self._sizes)
        if len(self._steps) == 1 and not others:
            return self._steps[0].attend(layer, q, k, v, scale)
        sizes = [*self._sizes, others] if others else self._sizes
        readers: list[Reader] = [*self._steps, self._apart] if others else [*self._steps]
        parts = zip(readers, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
        return torch.cat([reader.attend(layer, qs, ks, vs, scale) for reader, qs, ks, vs in parts])
