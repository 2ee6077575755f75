"""What requests hold in common: sessions in memory, contexts kept for others, and the bytes that all of them may take.

It does not know turns: who asks says whose sessions are in use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from longspan.engine.contexts import Context
from longspan.engine.kv_context import KVContext
from longspan.engine.residents import Residents
from longspan.engine.serving.cached import Cached
from longspan.engine.serving.job import Job
from longspan.engine.serving.requests import Limits
from longspan.errors import LongspanError, PoolExhaustedError, SaveError
from longspan.kv.budget import size
from longspan.sessions.session import Session

if TYPE_CHECKING:
    from longspan.engine.llm import LLM


class Holdings:
    """Sessions and contexts of one model."""

    def __init__(self, llm: LLM, limits: Limits) -> None:
        """Start with none."""
        self.llm, self.limits = llm, limits
        self.residents = Residents(
            llm,
            memory=limits.session_bytes,
            host=limits.session_host_bytes,
            count=limits.sessions,
            ttl=limits.session_seconds,
        )
        """Sessions; those that a request works on are in use."""
        self.cached = Cached(limits.cached)

    def session(self, name: str, *, make: bool = True) -> Session:
        """Return a session, in use from now on, from wherever it lies, or a new one if it may be made.

        Raises:
            SessionNotFoundError: there is none, and it may not be made.
            LongspanError: as `Residents.get`.
        """
        while True:
            try:
                return self.residents.get(name, make=make)
            except PoolExhaustedError:
                if not self.cached.shrink():
                    raise

    def clear(self, *, save: bool) -> None:
        """Forget everything; `save`: sessions are saved before (SaveError: one could not be, all others are)."""
        left = self.residents.close() if save else self.residents.names
        for name in left:
            self.residents.forget(name)
        while self.cached.shrink():
            pass
        if save and left:
            raise SaveError(self.residents.refused or f"session {left[0]!r} could not be saved")

    def has_room(self, job: Job, others: Sequence[Job], busy: Collection[str | None]) -> bool:
        """Whether the KV budget has room for all that a request may take, beside what others still may.

        So whoever has begun can end, and nobody is stopped for the sake of others. What is only kept gives way first. A
        request that could never fit is told so, and is to begin only to end.

        Args:
            job: the request.
            others: those under way.
            busy: sessions that are in use.
        """
        budget = self.llm.kv_budget
        if not budget.limited or job.cancelled:
            return True
        if not job.needs:
            assert job.prepared is not None, "texts are tokens by now"
            probe = self.llm.new_context(self.llm.without_documents())
            assert isinstance(probe, KVContext), "what has no documents keeps its keys"
            answer = min(job.request.params.max_tokens, self.llm.model.dimensions.window)
            job.needs = probe.bytes_for(job.prepared.tokens) + job.request.n * probe.bytes_for(answer)
            if (away := self._away(job.session)) > 0:
                job.needs += probe.bytes_for(away)
        promised = sum(max(0, other.needs - sum(each.nbytes for each in other.contexts)) for other in others)
        while True:
            left = budget.left
            assert left is not None, "the budget is limited"
            if job.needs <= left - promised:
                return True
            if self.cached.shrink() or self.residents.shrink(but=job.session):
                continue
            if busy or others:
                return False
            job.refused = PoolExhaustedError(
                f"the request may need {size(job.needs)} of the KV budget, which has {size(left)} left: raise it "
                "(--kv-budget), or ask for less text or fewer tokens"
            )
            return True

    def _away(self, name: str | None) -> int:
        """Return how many tokens a session remembers that is not on the device."""
        session = None if name is None else self.residents.peek(name)
        if name is None or (session is not None and session.memory is not None):
            return 0
        try:
            state: Any = self.llm.store.show(name).state
        except LongspanError:
            return 0  # it is new, or what is wrong with it is told when its turn has come
        return int((state.get("memory") or {}).get("length", 0))

    def pages(self, jobs: Sequence[Job]) -> tuple[dict[tuple[str, str], int], int]:
        """Return how many pages are held by tier and format, and the bytes that contexts refer to."""
        working = [context for job in jobs for context in job.contexts]
        held: list[Context] = [*working, *self.cached.contexts, *self.residents.contexts]
        contexts = list({id(context): context for context in held}.values())
        found: dict[tuple[str, str], int] = {}
        for pool in {id(kv.pool): kv.pool for context in contexts for kv in context._layers()}.values():
            for place, count in pool.census().items():
                found[place] = found.get(place, 0) + count
        for form, count in self.residents.host_pages.items():
            found["host", form] = found.get(("host", form), 0) + count
        return found, sum(context.nbytes for context in contexts)
