"""What a model remembers of a context between calls, and how tokens are added to it.

A context grows chunk by chunk: a chunk is added wholly or, if anything interrupts it, not at all; pages and recurrent
states (`recurrence.py`) have always read the same tokens. Two kinds:
`kv_context.py` keeps every layer's keys and values, `index_context.py` only what finds the pages to read again. They do
not know documents, questions or templates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention import Mechanism, make
from longspan.engine.recurrence import Recurrence
from longspan.hf.model import CausalModel
from longspan.kv.base import BLOCK, PAGE
from longspan.kv.budget import Budget
from longspan.kv.coming import Arrivals
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.tiers import Tiers
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.heads import Head, RetrievalHeads

CHUNK, GPU_CHUNK = 512, 2048
"""Tokens that run through the layers together, on a CPU and on a GPU: working memory is constant in the length of the
context."""

Tick = Callable[[int], None]
"""Told how many tokens were just read."""
Most = Callable[[], int]
"""Says how many tokens may be read together now."""


class Layer(Protocol):
    """What a context asks of one layer's memory, whatever it holds: `PagedKV`, `KeptKV`."""

    @property
    def length(self) -> int:
        """Number of tokens of the context, whatever is held of them."""
        ...

    pool: PagePool
    """Where its pages lie."""

    @property
    def nbytes(self) -> int:
        """Bytes that this context refers to."""
        ...

    def census(self) -> Counter[str]:
        """Return how many pages this context holds, by format."""
        ...

    def commit(self) -> None:
        """Say that the tokens so far were read for good."""
        ...

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        ...

    def drop(self, start: int, stop: int) -> None:
        """Give back what is held of the tokens `start .. stop - 1`, which nothing reads any more."""
        ...

    def free(self) -> None:
        """Give everything back."""
        ...

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return what `restore` takes."""
        ...

    def restore(self, prefix: str, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold what `tensors` returned, for a context of `length` tokens."""
        ...


class Context(ABC):
    """Tokens that a model has read."""

    recurrence: Recurrence
    """The states of the layers that do not attend."""

    def __init__(self, model: CausalModel, mechanism: Mechanism) -> None:
        """Start empty."""
        self.model, self.mechanism = model, mechanism
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        """Number of tokens read."""
        return len(self.tokens)

    @property
    def chunk(self) -> int:
        """Tokens that run through the layers together."""
        return GPU_CHUNK if self.model.device.type == "cuda" else CHUNK

    def reads_by(self, stop: int) -> Mechanism:
        """Return the mechanism by which a chunk of documents is read that ends at `stop`."""
        return self.mechanism

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept for the tokens read."""

    def extend(self, tokens: Sequence[int], tick: Tick = lambda _: None) -> None:
        """Read more tokens for good, in chunks; what the mechanism will never read again is dropped."""
        for count in self.extending(tokens):
            tick(count)

    def extending(self, tokens: Sequence[int], most: Most | None = None) -> Iterator[int]:
        """Do what `extend` does chunk by chunk: yields how many tokens each had. Those read stay if it is left.

        Args:
            tokens: to read.
            most: asked before each chunk how many tokens it may have, for whoever has other work; None: any number.
        """
        done = 0
        while done < len(tokens):
            chunk = list(tokens[done : done + self._within(self._most(), most)])
            self._add(chunk, mechanism=self.reads_by(self.length + len(chunk)))
            self._commit()
            self._drop()
            done += len(chunk)
            yield len(chunk)
        self._finish()

    def _most(self) -> int:
        """Return how many tokens the next chunk may hold: it ends where blocks and pages do, however many were read."""
        return self.recurrence.most(self.chunk - self.length % self.chunk)

    def _within(self, count: int, most: Most | None) -> int:
        """Return how many of `count` tokens are read together where only so many may be: to the end of a page."""
        wanted = count if most is None else most()
        if wanted >= count:
            return count
        whole = wanted - (self.length + wanted) % PAGE
        return max(1, wanted if whole <= 0 else whole)

    def _finish(self) -> None:
        """Do what is to be done when all documents so far were read."""
        return

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens that may be taken back (`truncate`) and return float32 logits `[V]` for the next one."""
        out: Tensor | None = None
        for _, last in self.stepping(tokens):
            out = last
        assert out is not None, "step() needs at least one token"
        return out

    def stepping(self, tokens: Sequence[int], most: Most | None = None) -> Iterator[tuple[int, Tensor | None]]:
        """Do what `step` does chunk by chunk: yields how many tokens each had, and behind the last one the logits.

        Arguments are those of `extending`.
        """
        done = 0
        while done < len(tokens):
            chunk = list(tokens[done : done + self._within(self.recurrence.most(self.chunk), most)])
            done += len(chunk)
            out = self._add(chunk, logits=int(done == len(tokens)))
            yield len(chunk), None if out is None else out[-1]

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens that may be taken back, and return the float32 logits `[T, V]` after each of them.

        All of them at once in memory: for a few hundred tokens.
        """
        parts = []
        done = 0
        while done < len(tokens):
            chunk = list(tokens[done : done + self.recurrence.most(self.chunk)])
            done += len(chunk)
            parts.append(self._add(chunk, logits=len(chunk)))
        assert parts and all(part is not None for part in parts), "score() needs tokens and a context with logits"
        return torch.cat([part for part in parts if part is not None])

    @abstractmethod
    def fork(self) -> Context:
        """Return a context that has read the same tokens and goes its own way; pages are shared until written to.

        Raises:
            PoolExhaustedError: what it would refer to is more than its budget has left.
        """

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on.

        A recurrent state can't be run backwards: where none was kept at `length` (there is one where documents end),
        tokens are read again from the newest one before it. Interrupted in that, the context is shorter than `length`.
        """
        with Undisturbed():
            committed = self.recurrence.committed
            start = self.recurrence.truncate(length)
            again = self.tokens[start:length]
            self._cut(start)
        documents = max(0, committed - start)
        if again[:documents]:
            self.extend(again[:documents])
        if again[documents:]:
            self.step(again[documents:])

    def _cut(self, length: int) -> None:
        """Forget the tokens from `length` on, at which a state was kept."""
        for kv in self._layers():
            # A layer that an interrupted chunk did not reach is shorter already.
            kv.truncate(min(length, kv.length))
        del self.tokens[length:]

    @abstractmethod
    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """Return the attention mass `[heads, N]` that a question's tokens put on each token of the context.

        The question is read after the context and taken back. A token of which nothing is held has mass 0.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what must be kept to continue (beside the tokens)."""

    @abstractmethod
    def restore(self, tokens: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned once (SessionCorruptError if it does not fit)."""

    @abstractmethod
    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        """Read one chunk, wholly or not at all, by this context's mechanism or another."""

    def beside(self) -> dict[int, int]:
        """Return the bytes of what is held beside the layers' pools, by what it is: forks may share some of it."""
        rotated = [mirror for kv in self._layers() if (mirror := getattr(kv, "mirror", None)) is not None]
        return {id(self.recurrence): self.recurrence.nbytes, **{id(mirror): mirror.nbytes for mirror in rotated}}

    @abstractmethod
    def _layers(self) -> Sequence[Layer]:
        """Every layer's memory."""

    def free(self) -> None:
        """Forget everything, and give every page back to whoever shares the pools; forks keep theirs."""
        self.truncate(0)
        for kv in self._layers():
            kv.free()

    def _commit(self) -> None:
        with Undisturbed():
            for kv in self._layers():
                kv.commit()
            self.recurrence.commit()

    def _count(self, chunk: list[int], state: dict[str, Tensor], *, owned: bool = False) -> None:
        """Count a chunk as read that every layer has read; from then on an interruption does not take it back."""
        with Undisturbed():
            self.recurrence.take(self.length + len(chunk), state, owned=owned)
            self.tokens.extend(chunk)

    def dropped(self, length: int) -> tuple[int, int]:
        """Return the tokens `start .. stop - 1` that nothing reads any more at a context of `length`."""
        return self._unseen(*self.mechanism.dropped(length), length)

    def _unseen(self, start: int, stop: int, length: int) -> tuple[int, int]:
        """Return what of these tokens no layer sees by a window of its own; (0, 0): none."""
        if own := [window for window in self.model.windows if window is not None]:
            stop = min(stop, length - max(own) + 1)
        return (start, stop) if start < stop else (0, 0)

    def _drop(self) -> None:
        with Undisturbed():
            start, stop = self.dropped(self.length)
            for kv in self._layers():
                kv.drop(start, stop)
            if start < stop:
                self.recurrence.shrink(0)  # behind an older state, keys are missing that would be read again


def alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from the first on."""
    most = min(len(first), len(second))
    if not most or first[0] != second[0]:
        return 0
    if list(first[:most]) == list(second[:most]):
        return most
    return next(i for i in range(most) if first[i] != second[i])


def kv_head(model: CausalModel, head: Head) -> int:
    """Return the KV head that a query head (layer, head) reads."""
    return head[1] // (model.dimensions.query_heads // model.dimensions.kv_heads)


def newest(model: CausalModel, window: int, sinks: int = 4) -> Mechanism:
    """Return what reads documents where dense attention can't: sinks and a window, at positions that were trained.

    Args:
        model: whose trained length holds both.
        window: newest keys that a query sees, where the trained length allows so many.
        sinks: first keys that every query sees.
    """
    return make("streaming", window=max(1, min(window, model.dimensions.window - sinks)), sinks=sinks)


def paged(
    model: CausalModel,
    kv_format: str | None = None,
    budget: Budget | None = None,
    summaries: Sequence[str] = (),
    block: int = PAGE,
    tiers: Tiers | None = None,
    *,
    layer: int,
) -> PagedKV:
    """Return one layer's empty pages, in a pool of their own.

    Args:
        model: whose layer it is.
        kv_format: format of full pages; None: the model's number type.
        budget: the session's bytes; its root is the pool's.
        summaries: which summaries pages keep up to date.
        block: tokens that a summary stands for.
        tiers: where copies of pages lie, and pages are read from that lie there alone; None: copies in host memory,
            which are not read.
        layer: which one, counted among those that attend.
    """
    sizes = model.dimensions
    pool = PagePool(
        sizes.kv_heads,
        sizes.head_dim,
        sizes.head_dim,
        model.dtype,
        model.device,
        None if budget is None else budget.root,
        kv_format=kv_format,
        summaries=summaries,
        # Blocks larger than a page are put together from pages.
        block=block if PAGE % block == 0 and block % BLOCK == 0 else PAGE,
        tiers=tiers,
    )
    kv = PagedKV(pool, model.rotaries[layer], budget)
    kv.reads_below, kv.window = tiers is not None, model.windows[layer]
    return kv


def restore_layers(layers: Sequence[Layer], length: int, tensors: Mapping[str, Tensor]) -> None:
    """Hold every layer's saved pages (SessionCorruptError, PoolExhaustedError: as `PagedKV.restore`).

    Those of a file come as they are read, and the others in the background.
    """
    for i, kv in enumerate(layers):
        kv.restore(f"{i}.", length, tensors)
    away = [plane.coming for kv in layers for plane in kv.pool.planes]
    if found := [coming for coming in away if coming is not None]:
        Arrivals(found).start()
