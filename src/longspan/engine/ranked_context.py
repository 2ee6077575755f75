"""The context whose keys and values lie on several ranks.

A long chunk of documents is split: each rank runs its own tokens through the layers, and in every layer queries go to
the keys or keys to the queries (`ranked_reader.py`). A question and decode are run by every rank: only attention is
shared, and every rank has the same logits. Whatever is done is done on all ranks in step (`ranks.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, mechanisms, parse
from longspan.distributed.layer import ShardKV
from longspan.engine.contexts import Layer, Tick, kv_head
from longspan.engine.kv_context import KVContext
from longspan.engine.memory_plan import MemoryPlan
from longspan.engine.ranked_reader import Over
from longspan.engine.ranks import Ranks
from longspan.engine.readers import Asked
from longspan.errors import ParallelError, SessionCorruptError, UsageError
from longspan.hf.model import CausalModel
from longspan.hf.native.handing import Split
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.retrieval.choose import token_mass
from longspan.retrieval.heads import RetrievalHeads


class RankedContext(KVContext):
    """Keeps every layer's keys and values, a part on each rank."""

    def __init__(
        self, model: CausalModel, mechanism: Mechanism, ranks: Ranks, prefill: Mechanism | None = None
    ) -> None:
        """Start empty, on all ranks.

        Args:
            model: this rank's, with the same weights as the others'.
            mechanism: by what queries attend.
            ranks: who shares it.
            prefill: by what documents are read; see `KVContext.prefill`.

        Raises:
            UsageError: a mechanism that does not attend over ranks, or a model whose layers have windows of their own.
            ParallelError: a rank is gone.
        """
        check(mechanism, prefill)
        if any(model.windows):
            raise UsageError(f"layers of {model.name} see windows of their own, which run on one GPU alone")
        self.ranks = ranks
        super().__init__(model, mechanism, prefill)
        with ranks.together(
            "new", attention=mechanism.describe(), prefill=None if prefill is None else prefill.describe()
        ):
            shards = ranks.shards(mechanism)
            for kv in self.layers:
                kv.rotary = ranks.rotary(model.rotary, shards)
            self.parts = [ShardKV(kv, shards, model.rotary, ranks.host) for kv in self.layers]
            """Every layer, in tokens of the whole context; `layers` are the pages that this rank holds."""
            self.number = ranks.add(self)

    @property
    def untold(self) -> str:
        """See `KVContext`."""
        return "contexts over several ranks do not tell what was read"

    @property
    def chunk(self) -> int:
        """See `Context`: every rank has its share."""
        return super().chunk * self.ranks.group.size

    @property
    def steps_alone(self) -> bool:
        """See `KVContext`: other ranks must be told."""
        return True

    def reads_rows(self, n: int) -> bool:
        """See `KVContext`: rows lie on other ranks too."""
        return False

    def reserve(self, tokens: int) -> MemoryPlan | None:
        """See `KVContext.reserve`: nothing is set aside."""
        return None

    def do(self, work: str, details: Mapping[str, Any]) -> None:
        """Do what rank 0 told (all other ranks)."""
        if work == "add":
            by = details["mechanism"]
            self.hints = Hints(chosen_pages=tuple(details["pages"]))
            self._add(details["tokens"], logits=details["logits"], mechanism=None if by is None else parse(by))
        elif work == "mass":
            self.mass(details["question"], RetrievalHeads.from_json(details["heads"]))
        elif work == "restore":
            self.restore(details["tokens"], {})
        elif work == "truncate":
            self.truncate(details["length"])
        else:
            plain: dict[str, Callable[[], object]] = {
                "commit": self._commit,
                "drop": self._drop,
                "free": self.free,
                "fork": self.fork,
                "tensors": self.tensors,
            }
            plain[work]()

    def fork(self, budget: Budget | None = None) -> RankedContext:
        """See `KVContext.fork`."""
        with self._together("fork"):
            other = copy.copy(self)
            other.tokens, other.hints = list(self.tokens), Hints()
            other.recurrence = self.recurrence.fork()
            other.parts = [part.fork() for part in self.parts]
            other.layers = [part.held for part in other.parts]
            other.number = self.ranks.add(other)
        return other

    def truncate(self, length: int) -> None:
        """See `Context.truncate`."""
        with self._together("truncate", length=length):
            super().truncate(length)

    def free(self) -> None:
        """See `Context.free`."""
        with self._together("free"):
            super().free()

    def mass(self, question: Sequence[int], heads: RetrievalHeads, tick: Tick = lambda _: None) -> Tensor:
        """See `Context`: every rank looks at its own keys, and shares are of all of them."""
        with self._together("mass", question=list(question), heads=heads.to_json()):
            before, group = self.length, self.ranks.group
            asked = Asked(Over(self.parts, self.mechanism, self.hints, self.model.trained, group, before), heads)
            try:
                self.model.forward(question, asked, state=self.recurrence.state())
            finally:
                self.truncate(before)
            start, stop = self.dropped(before)
            # The first page that is held whole again; nothing before it is asked for.
            first = min(-(-stop // PAGE) * PAGE, before) if stop > start else 0
            shards = self.parts[0].shards
            begin, end = shards.count(first), shards.count(before)
            keys = {
                head: self.layers[head[0]].known_keys(begin, end)[0, kv_head(self.model, head)] for head in heads.heads
            }
            own = token_mass(
                asked.queries,
                keys,
                sinks=shards.count(heads.sinks) if first == 0 else 0,
                whole=lambda total: torch.logsumexp(group.gather(total), 0),
            )
            most = max(shards.of(rank).count(before) - shards.of(rank).count(first) for rank in range(group.size))
            every = group.gather(torch.nn.functional.pad(own, (0, most - own.shape[1])))
            found = own.new_zeros(own.shape[0], before)
            for rank in range(group.size):
                share = shards.of(rank)
                tokens = share.tokens(torch.arange(share.count(first), share.count(before)))
                found[:, tokens] = every[rank, :, : len(tokens)]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """See `Context`: what one rank would save, on rank 0; on others nothing."""
        with self._together("tensors"):
            pages = {name: each for i, part in enumerate(self.parts) for name, each in part.tensors(f"{i}.").items()}
        return {**pages, **self.recurrence.tensors()} if self.ranks.leads else {}

    def restore(self, tokens: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """See `Context`: what one rank saved, or any number of them; rank 0 has it and hands it over."""
        with self._together("restore", tokens=list(tokens)):
            try:
                self._restore_states(len(tokens), tensors)
                for i, part in enumerate(self.parts):
                    part.restore(f"{i}.", len(tokens), tensors)
            except SessionCorruptError:
                self._cut(0)
                raise
            self.tokens = list(tokens)
            self._committed = self.length

    def _restore_states(self, length: int, tensors: Mapping[str, Tensor]) -> None:
        """Hold the recurrent states that were saved, on all ranks."""
        if not self.recurrence.spec:
            return
        group, fault = self.ranks.host, ""
        if self.ranks.leads:
            try:
                self.recurrence.restore(length, tensors, self.model.device)
            except SessionCorruptError as error:
                fault = str(error)
        positions = self.recurrence.positions if self.ranks.leads else []
        count = int(group.broadcast(torch.tensor([-1 if fault else len(positions)])))
        if count < 0:
            raise SessionCorruptError(
                fault or "the saved states do not fit the model: remove the session and read again"
            )
        lengths = group.broadcast(torch.tensor([*positions, 0] if self.ranks.leads else [0] * (count + 1)))
        own = self.recurrence.tensors()
        states = {}
        for at in lengths[:-1].tolist():
            for name, (shape, dtype) in self.recurrence.spec.items():
                full = f"states.{at}.{name}"
                states[full] = group.broadcast(own[full].cpu() if full in own else torch.empty(shape, dtype=dtype))
        if not self.ranks.leads:
            self.recurrence.restore(length, states, self.model.device)

    def _add(self, chunk: list[int], *, logits: int = 0, mechanism: Mechanism | None = None) -> Tensor | None:
        by = None if mechanism is None else mechanism.describe()
        with self._together("add", tokens=chunk, logits=logits, mechanism=by, pages=list(self.hints.chosen_pages)):
            before, group = self.length, self.ranks.group
            # Recurrent states are handed along the ranks by native layers (`hf/native/handing.py`), where parts of a
            # chunk are neighbours; other models' layers run all tokens on every rank.
            recurs = bool(self.recurrence.spec)
            by_all = mechanism is None or logits > 0 or (recurs and self.model.native is None)
            reads = mechanism or self.mechanism
            shape = self.model.dimensions.shape(self.model.dtype.itemsize)
            brings = None if by_all or recurs else self.ranks.brings(reads, shape, len(chunk), before)
            split = None if by_all else self.ranks.split(len(chunk), before, keys=brings is not None)
            own = chunk if split is None else [chunk[at - before] for at in split.positions(group.rank).tolist()]
            state = self.recurrence.state()
            reader = Over(self.parts, reads, self.hints, self.model.trained, group, before, split, brings)
            try:
                parts = None if split is None else Split(group, split.counts)
                out = self.model.forward(own, reader, logits=logits, state=state, split=parts)
                self._count(chunk, state)
            except ParallelError:
                raise  # nothing can be done together any more
            except BaseException:
                self._cut(before)
                raise
            return out

    def _commit(self) -> None:
        with self._together("commit"):
            super()._commit()

    def _drop(self) -> None:
        with self._together("drop"):
            super()._drop()

    def _layers(self) -> Sequence[Layer]:
        return self.parts

    def _steps(self) -> None:
        return None

    def _together(self, work: str, **details: Any) -> Any:
        return self.ranks.together(work, context=self.number, **details)


def check(mechanism: Mechanism, prefill: Mechanism | None) -> None:
    """Refuse what does not attend over several ranks (UsageError)."""
    for each in (mechanism, prefill):
        if each is not None and not each.sharded:
            served = ", ".join(name for name, kind in mechanisms().items() if kind.sharded)
            raise UsageError(f"attention {each.name!r} does not run over several ranks: use one of {served}")
