"""What a context that keeps every layer's keys and values holds of them, and the bytes that they may take.

How tokens are read, taken back and answered is `kv_context.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, Shape, make
from longspan.attention.rebalance import FORMATS, PageMass
from longspan.engine import compatible, memory_plan
from longspan.engine.asked_copy import AskedCopy
from longspan.engine.contexts import Context, Layer, alike, newest, paged
from longspan.engine.kept_layers import KeptLayers
from longspan.engine.memory_plan import MemoryPlan
from longspan.engine.recurrence import SHARE, Recurrence
from longspan.engine.resolutions import Needs, settle
from longspan.engine.sources import Noted
from longspan.engine.stepper import Stepper
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.memory import LayerMemory
from longspan.kv.tiers import Tiers

PREFILL_WINDOW = 1024
"""Newest keys, as far as the trained length holds them, that a query of a document sees beyond that length where no
prefill was chosen."""


class KVLayers(Context):
    """Holds every layer's keys and values."""

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
        self._aside = 0
        """Tokens that memory was set aside for."""
        kinds = mechanism.summaries if summaries is None else tuple(summaries)
        self.budget = Budget() if budget is None else budget
        self._tiered = tiers is not None and self.budget.limited and not mechanism.evicts
        shape = model.dimensions.shape(model.dtype.itemsize)
        near = any(model.windows)
        compatible.check(mechanism, prefill, shape, adapts=self._adapts, tiered=tiers is not None, near=near)
        self.kept = KeptLayers.of(model, mechanism, kv_format, self.budget, tiers)
        """Every layer's memory where keys are evicted; None: `layers` holds it."""
        self._asked: AskedCopy | None = None
        self.layers = [
            paged(
                model, kv_format, self.budget, kinds, mechanism.block if mechanism.summaries else PAGE, tiers, layer=i
            )
            for i in range(model.dimensions.layers if self.kept is None else 0)
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
        # What was set aside for more tokens before is no room for a chunk's tensors.
        tokens = max(tokens, self._aside)
        memory, reads = memory_plan.available(self.model, held), self.reads_by(tokens)
        found = memory_plan.check(self.model, reads, tokens, memory)
        self._planned = memory_plan.chunk_for(self.model, reads, tokens, memory)
        self._aside, pages = tokens, -(-tokens // PAGE)
        for kv in self.layers:
            lacking = pages - len(kv.table) - len(kv.pool.native.free_slots)
            if lacking > 0:
                kv.pool.reserve(kv.pool.native.slots + lacking)
            if kv.mirrored:
                kv.mirror.reserve(pages * PAGE)
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
        if self.layers[layer].window is not None:
            return {}
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
        return self._unseen(start, stop, length)

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

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`."""
        pages = {name: tensor for i, kv in enumerate(self._layers()) for name, tensor in kv.tensors(f"{i}.").items()}
        return {**pages, **self.recurrence.tensors()}

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
        window = max(window, *(own or 0 for own in self.model.windows))
        # What may be taken back must stay, and a window's first page may be cut.
        kept = window + 2 * PAGE + length - self._committed
        return Needs(length, new, sinks, kept, () if self._tiered else FORMATS)

    def _make_room(self, count: int) -> None:
        """Have room for so many new tokens within the budget, as far as that goes (PoolExhaustedError)."""
        if self._moves:
            self._settle(count)
            return
        # Checkpoints give way to pages; each layer may have to copy the page that it shares with a fork.
        new = -(-(self.length + count) // PAGE) - -(-self.length // PAGE) + 1
        self.recurrence.make_room(new * sum(kv.pool.least_bytes for kv in self.layers))

    def _layers(self) -> Sequence[Layer]:
        return self.layers if self.kept is None else self.kept.layers
