"""The context that keeps every layer's keys and values, and attends by its mechanism."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, Shape, make
from longspan.attention.evicting import Evicting
from longspan.attention.rebalance import FORMATS, PageMass
from longspan.engine import compatible, memory_plan
from longspan.engine.asked_copy import AskedCopy
from longspan.engine.contexts import Context, Layer, Most, Tick, alike, kv_head, newest, paged, restore_layers
from longspan.engine.kept_layers import KeptLayers
from longspan.engine.memory_plan import MemoryPlan
from longspan.engine.readers import Asked, Attending
from longspan.engine.recurrence import SHARE, Recurrence
from longspan.engine.repetition import repeat
from longspan.engine.resolutions import Needs, demoted, settle
from longspan.engine.sources import Noted
from longspan.engine.stepper import AHEAD, TOGETHER, Stepper
from longspan.errors import PoolExhaustedError
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.memory import LayerMemory
from longspan.kv.tiers import Tiers
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import RetrievalHeads

PREFILL_WINDOW = 1024
"""Newest keys, as far as the trained length holds them, that a query of a document sees beyond that length where no
prefill was chosen."""


class KVContext(Context):
    """Keeps every layer's keys and values."""

    def __init__(
        self,
        model: CausalModel,
        mechanism: Mechanism,
        prefill: Mechanism | None = None,
        *,
        kv_format: str | None = None,
        budget: Budget | None = None,
        summaries: Sequence[str] | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        """Start empty.

        Args:
            model: whose layers' keys and values are kept.
            mechanism: by what queries attend.
            prefill: by what documents are read; see `prefill`.
            kv_format: format of full pages (`kv.formats.parse`); None: the model's number type.
            budget: bytes that all layers' pages and recurrent states may take together; None: no limit.
            summaries: which summaries pages keep up to date; None: those that the mechanism reads.
            tiers: where pages move that the budget does not hold, to be read from there; None: only what a mechanism
                can do without moves, to host memory.

        Raises:
            UnknownNameError, UsageError: no such format, or one that does not suit the model's number type.
            UsageError: a budget below one page a layer and two recurrent states; tiers for what forgets.
        """
        super().__init__(model, mechanism)
        self._planned: int | None = None
        kinds = mechanism.summaries if summaries is None else tuple(summaries)
        self.budget = Budget() if budget is None else budget
        self._tiered = tiers is not None and self.budget.limited and not mechanism.evicts
        shape = model.dimensions.shape(model.dtype.itemsize)
        compatible.check(mechanism, prefill, shape, adapts=self._adapts, tiered=tiers is not None)
        self.kept = KeptLayers.of(model, mechanism, kv_format, self.budget, tiers)
        """Every layer's memory where keys are evicted; None: `layers` holds it."""
        self._asked: AskedCopy | None = None
        self.layers = [
            paged(model, kv_format, self.budget, kinds, mechanism.block if mechanism.summaries else PAGE, tiers)
            for _ in range(model.dimensions.layers if self.kept is None else 0)
        ]
        planned = model.native is not None and model.device.type == "cuda"
        chunk = memory_plan.CHUNKS[0] if planned else self.chunk
        self.recurrence = Recurrence(model.state_spec, self.layers, chunk, self.budget)
        states = 2 * self.recurrence.state_bytes
        self.budget.require(
            sum(kv.pool.least_bytes for kv in self.layers) + states,
            f"one page for each of {len(self.layers)} layers" + (" and two recurrent states" if states else ""),
        )
        self.attend_by(mechanism)
        self._committed = 0
        self._repeated = 0  # tokens: those before were repeated for a mechanism that evicts by that
        self._stepper: Stepper | None = None
        self._masses: list[PageMass] = []
        """How much attention pages get, a layer, where a budget decides by it which of them stay exact."""
        if self._moves:
            self._masses = [PageMass() for _ in self.layers]
            for kv, mass in zip(self.layers, self._masses, strict=True):
                kv.mass = mass
        self.noted: Noted | None = None
        """Notes queries while an answer is written; None: nobody asks."""
        self.hints = Hints()
        """What the mechanism is told at the next step: the pages chosen for a question."""
        self.prefill = prefill
        """By what documents are read; None: by the mechanism, or as `reads_by` says where that only decodes."""

    @property
    def chunk(self) -> int:
        """See `Context`."""
        if self.kept is not None:
            return min(super().chunk, self.kept.chunk)
        return super().chunk if self._planned is None else self._planned

    def reserve(self, tokens: int) -> MemoryPlan | None:
        """Plan the memory of a context of so many tokens in all, and set aside what its pages take.

        Returns:
            The plan; None: nothing is planned on a CPU, where transformers' modules run, or where a budget, a window or
            a smaller format bounds what is held.

        Raises:
            PoolExhaustedError: it does not fit the device; the message says what does. Nothing was set aside.
        """
        if self.kept is not None or self.model.native is None or self.model.device.type != "cuda":
            return None
        if self.budget.limited or self.dropped(tokens) != (0, 0):
            return None  # memory is bounded otherwise
        if not all(kv.pages.plain and kv.pool.format is kv.pool.native.format for kv in self.layers):
            return None
        held = sum(kv.pool.nbytes for kv in self.layers) + self.recurrence.nbytes
        held += sum(kv.mirror.held.nbytes for kv in self.layers if kv.mirror.length)
        memory, reads = memory_plan.available(self.model, held), self.reads_by(tokens)
        found = memory_plan.check(self.model, reads, tokens, memory)
        self._planned = memory_plan.chunk_for(self.model, reads, tokens, memory)
        pages = -(-tokens // PAGE)
        for kv in self.layers:
            lacking = pages - len(kv.table) - len(kv.pool.native.free_slots)
            if lacking > 0:
                kv.pool.reserve(kv.pool.native.slots + lacking)
        return found

    def attend_by(self, mechanism: Mechanism) -> None:
        """Attend by another mechanism from now on; everything that it reads must still be held."""
        assert mechanism.evicts == (self.kept is not None), "what evicts needs a context of its own"
        self.mechanism = mechanism
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        for i, kv in enumerate(self.layers):
            if kv.memory is not None:
                kv.memory.truncate(0)
            shapes = self._remembers(mechanism, i)
            kv.memory = LayerMemory(mechanism, shapes, dtype, kv.pool.device, kv.budget) if shapes else None

    def _remembers(self, mechanism: Mechanism, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """Return what a mechanism keeps of a layer beside keys and values."""
        pool = self.layers[layer].pool
        sizes = Shape(self.model.dimensions.query_heads, pool.kv_heads, pool.dims["k"], pool.dims["v"])
        return mechanism.memory(sizes)

    def reads_by(self, stop: int) -> Mechanism:
        """See `Context`. What chooses in decode only reads densely up to the trained length, by a window beyond."""
        if self.prefill is not None:
            return self.prefill
        if self.mechanism.prefills:
            return self.mechanism
        if stop > self.model.dimensions.window or self._adapts or any(kv.readable() is not None for kv in self.layers):
            # Beyond the trained length; or where pages are, or may be, held as summaries that only it does not need.
            return newest(self.model, PREFILL_WINDOW)
        return make("dense")

    def dropped(self, length: int) -> tuple[int, int]:
        """See `Context`: what reads documents may look further back than what answers."""
        if self.kept is not None:
            return (0, length)  # each head forgets others, and what was learned of any token can't be taken back
        start, stop = self.mechanism.dropped(length)
        if self.prefill is not None:
            first, last = self.prefill.dropped(length)
            start, stop = max(start, first), min(stop, last)
        return (start, stop) if start < stop else (0, 0)

    @property
    def nbytes(self) -> int:
        """See `Context`."""
        asked = 0 if self._asked is None else self._asked.nbytes
        return sum(kv.nbytes for kv in self._layers()) + asked + self.recurrence.nbytes

    @property
    def beyond_window(self) -> bool:
        """Whether positions stay within what the model was trained on, however long the context."""
        return self.mechanism.beyond_window and (self.prefill is None or self.prefill.beyond_window)

    @property
    def window_taken(self) -> int:
        """Positions of the model's window that are not left for a question and its answer."""
        if self.kept is not None:
            return self.kept.held
        return 0 if self.beyond_window else self.length

    @property
    def _adapts(self) -> bool:
        """Whether pages are held in less detail, which only the mechanism reads."""
        return self.mechanism.adapts and self.budget.limited and not self._tiered

    @property
    def _moves(self) -> bool:
        """Whether pages give way to others within the budget."""
        return self._adapts or self._tiered

    def _settle(self, new: int) -> None:
        """Make room for new tokens within the budget (PoolExhaustedError, and what becomes of pages: `resolutions`)."""
        settle(self.layers, self._masses, self._page_bytes(), self._needs(self.length, new), self.budget)

    def _page_bytes(self) -> int:
        """Return the bytes that all layers' pages may take within the budget."""
        spent, left = sum(kv.nbytes for kv in self.layers), self.budget.left
        assert left is not None, "only a limited budget is settled"
        if self.recurrence.state_bytes:
            self.recurrence.shrink(SHARE * (spent + left))
            left = (self.budget.left or 0) - self.recurrence.due
        return spent + left

    def _needs(self, length: int, new: int) -> Needs:
        """Return what must stay exact of a context of `length` tokens while `new` ones are read."""
        # Documents and questions may be read by different mechanisms: what either of them reads exactly stays.
        readers = [self.mechanism, self.prefill or newest(self.model, PREFILL_WINDOW)]
        if self._tiered:
            readers = readers[:1]  # what others read may come from below
        sinks = max(int(getattr(reader, "sinks", 0)) for reader in readers)
        window = max(int(getattr(reader, "window", 0)) for reader in readers)
        # What may be taken back must stay, and a window's first page may be cut.
        kept = window + 2 * PAGE + length - self._committed
        return Needs(length, new, sinks, kept, () if self._tiered else FORMATS)

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
        """Return what reads tokens that are not counted: whoever ran it cuts the context back to its own length."""
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
        # What evicts does so by chunks: what is kept must not depend on who else is served.
        return count if self.kept is not None else super()._within(count, most)

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

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        pages = {name: tensor for i, kv in enumerate(self._layers()) for name, tensor in kv.tensors(f"{i}.").items()}
        return {**pages, **self.recurrence.tensors()}

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

    def _make_room(self, count: int) -> None:
        """Have room for so many new tokens within the budget, as far as that goes (PoolExhaustedError)."""
        if self._moves:
            self._settle(count)
            return
        # Checkpoints give way to pages; each layer may have to copy the page that it shares with a fork.
        new = -(-(self.length + count) // PAGE) - -(-self.length // PAGE) + 1
        self.recurrence.make_room(new * sum(kv.pool.least_bytes for kv in self.layers))

    @property
    def cuttable(self) -> bool:
        """Whether it can be cut back to any page: keys were neither dropped nor evicted, written down nor moved."""
        native = all(kv.pool.format is kv.pool.native.format and kv.memory is None for kv in self.layers)
        return native and self.kept is None and not self._moves and self.dropped(self.length) == (0, 0)

    def common(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens this context has read first and can be cut back to at no cost."""
        count = alike(self.tokens, tokens)
        if count == self.length or not count:
            return count
        if not self.cuttable:
            return 0
        if self.recurrence.spec:
            return max((at for at in self.recurrence.positions if at <= count), default=0)
        return count

    def bytes_for(self, tokens: int) -> int:
        """Return the bytes that so many more tokens take at most, where all of them are kept."""
        if self._moves or self.kept is not None or self.dropped(1 << 40) != (0, 0):
            return 0  # what is held is bounded, or finds room by itself
        pages = -(-tokens // PAGE) + 1
        return pages * sum(kv.pool.least_bytes for kv in self.layers) + 2 * self.recurrence.state_bytes

    # --- one token of a batch of contexts ----------------------------------------------------------------------------

    @property
    def reads_rows(self) -> bool:
        """Whether the next token attends to every key and value that is held, as it is held, and to nothing else."""
        return (
            self.kept is None
            and self.mechanism.reads_all
            and not self.recurrence.spec
            and not self._moves
            and self.model.device.type == "cpu"
            and all(
                kv.pages.plain and kv.memory is None and not kv.blocks.kept and kv.pool.format is kv.pool.native.format
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

    def _layers(self) -> Sequence[Layer]:
        return self.layers if self.kept is None else self.kept.layers

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
