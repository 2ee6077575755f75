"""The ranks that share one engine's contexts: who leads, how tokens and queries are spread, what is told to followers.

Rank 0 reads input, samples and answers. Before each piece of work on a context it tells the others, which do the same
on their own part: their contexts are made, extended, cut, forked and restored in step with its own. Work is told in
pieces that are done wholly or not at all (a chunk), and Ctrl-C waits for the end of one, so that ranks never stand at
different places. It does not know what is read: `ranked_context.py` does.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from longspan.attention import Mechanism, Shape, parse
from longspan.distributed.context_parallel import GATHER_BYTES
from longspan.distributed.follow import Word
from longspan.distributed.group import Group
from longspan.distributed.layout import Layout, contiguous, zigzag
from longspan.distributed.shards import ShardRotary, Shards
from longspan.errors import LongspanError, ParallelError, UnknownNameError, UsageError
from longspan.hf.model import CausalModel
from longspan.kv.rotary import Rotary
from longspan.kv.undisturbed import Undisturbed

if TYPE_CHECKING:
    from longspan.engine.ranked_context import RankedContext

PLACEMENTS = ("auto", "sharded", "ring", "context_parallel")
"""How a chunk of documents is attended from: queries go to the keys (`sharded`, any mechanism that can), keys go round
(`ring`) or are gathered on every rank (`context_parallel`; both for dense attention, others are sharded), or for each
chunk what sends less (`auto`): few keys are then gathered, more go round."""
EXPERTS = "experts"
"""Behind a placement, with a comma: each rank holds a part of the model's experts."""
LEAST = 16
"""Tokens of a chunk for each rank from which on they are split: fewer are run by every rank."""


class Ranks:
    """The ranks of one engine."""

    def __init__(self, group: Group, placement: str = "auto", *, own: bool = False) -> None:
        """Take the ranks; all of them do so.

        Args:
            group: the ranks.
            placement: one of `PLACEMENTS`, and `,experts` where each rank holds a part of the model's experts.
            own: whether nobody else talks to them, so that the end of work ends them.

        Raises:
            UnknownNameError: no such placement.
        """
        name, _, more = placement.partition(",")
        if name not in PLACEMENTS or more not in ("", EXPERTS):
            told = f"use one of {', '.join(PLACEMENTS)}, and ,{EXPERTS} behind it"
            raise UnknownNameError(f"unknown --parallel {placement!r}: {told}")
        self.placement, self.shares_experts, self._own = name, bool(more), own
        self.group, self.host = group, group.host()
        """For tensors where the model is, and in host memory."""
        self.word = Word(self.host)
        self.leads = group.rank == 0
        """Whether this is the rank that decides."""
        self._contexts: weakref.WeakValueDictionary[int, RankedContext] | dict[int, RankedContext]
        self._contexts = weakref.WeakValueDictionary() if self.leads else {}
        self._next, self._closed, self._depth = 0, list[int](), 0
        self._lost: LongspanError | None = None
        self._rotaries: dict[tuple[int, int], ShardRotary] = {}

    def shards(self, mechanism: Mechanism) -> Shards:
        """Return how a context's tokens are dealt out."""
        return Shards(self.group.rank, self.group.size, mechanism.shard_unit)

    def rotary(self, whole: Rotary | None, shards: Shards) -> ShardRotary | None:
        """Return what rotates rows; all layers and contexts share its angles."""
        if whole is None:
            return None
        key = id(whole), shards.unit
        if key not in self._rotaries:
            self._rotaries[key] = ShardRotary(whole, shards)
        return self._rotaries[key]

    def split(self, count: int, first: int, *, keys: bool) -> Layout | None:
        """Return which tokens of a chunk, from `first` on, each rank runs through the layers; None: each runs all.

        `keys`: whether keys go to the queries.
        """
        size = self.group.size
        if count < LEAST * size:
            return None
        # Queries that go to the keys are the same work wherever they come from; later ones see more of the keys that
        # come to them.
        return zigzag(count, size, first) if keys else contiguous(count, size, first)

    def brings(self, mechanism: Mechanism, shape: Shape, count: int, first: int) -> str | None:
        """Return how keys go to the queries of a chunk of `count` tokens behind `first` others: `ring` or
        `context_parallel`; None: queries go to the keys.
        """
        if self.placement == "sharded" or not mechanism.exact:
            return None
        if self.placement != "auto":
            return self.placement
        # Of a query q and the output in float32 travel, of a key it and its value: the fewer bytes.
        queries = count * shape.query_heads * (shape.head_dim * shape.kv_bytes + 4 * (shape.value_dim + 1))
        keys = (first + count) * shape.token_bytes
        if keys >= queries:
            return None
        return "context_parallel" if keys <= GATHER_BYTES else "ring"

    def add(self, context: RankedContext) -> int:
        """Count a context among those that all ranks hold, and return its number."""
        number, self._next = self._next, self._next + 1
        self._contexts[number] = context
        if self.leads:
            # Nothing may be told while Python clears up: it is told with the next piece of work.
            weakref.finalize(context, self._closed.append, number)
        return number

    @contextmanager
    def together(self, work: str, **details: Any) -> Iterator[None]:
        """Do a piece of work on all ranks; what it consists of is not told again.

        Raises:
            ParallelError: a rank is gone, now or before.
        """
        if self._lost is not None:
            raise self._lost
        with Undisturbed():
            try:
                if self.leads and self._depth == 0:
                    closed = [self._closed.pop() for _ in range(len(self._closed))]
                    self.word.tell(work, closed=closed, **details)
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
            except ParallelError as error:
                self._lost = error
                raise

    def follow(self, model: CausalModel, make: Callable[[Mechanism, Mechanism | None], RankedContext]) -> None:
        """Do what rank 0 tells until it ends (all other ranks).

        Args:
            model: this rank's.
            make: makes an empty context for an attention, and what reads documents.

        Raises:
            ParallelError: rank 0, or another, is gone.
        """
        if threading.current_thread() is threading.main_thread():
            # Rank 0 gets the same signals, and says what becomes of the work; if it is gone, so is the connection.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        while True:
            work, details = self.word.hear()
            for number in details.pop("closed"):
                self._contexts.pop(number, None)
            if work == "end":
                self._leave()
                return
            try:
                with self.together(work):
                    if work == "new":
                        prefill = details["prefill"]
                        make(parse(details["attention"]), None if prefill is None else parse(prefill))
                    else:
                        self._contexts[details.pop("context")].do(work, details)
            except ParallelError:
                raise
            except LongspanError:
                continue  # rank 0 says the same to whoever asked

    def end(self) -> None:
        """Let the others go (rank 0); nothing can be read over ranks afterwards."""
        if self._lost is None and self.leads:
            with self.together("end"):
                pass
            self._lost = UsageError("the other ranks were let go: start the program again")
            self._leave()

    def _leave(self) -> None:
        self._contexts.clear()
        if self._own:
            self.host.close()
            self.group.close()


def join(placement: str, device: str = "auto") -> Ranks | None:
    """Return the ranks that torchrun started, this process among them; None: it is alone.

    Args:
        placement: how contexts lie over them.
        device: as for `LLM`.

    Raises:
        UnknownNameError, UsageError: no such placement; ranks were not started together.
        ParallelError: the others did not come.
    """
    group = Group.start(None if device == "auto" else device.partition(":")[0])
    return None if group.size == 1 else Ranks(group, placement, own=True)
