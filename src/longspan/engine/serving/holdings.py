"""What requests hold in common: sessions in memory, contexts kept for others, and the bytes that all of them may take.

It does not know turns: who asks says whose sessions are in use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from longspan.engine.kv_context import KVContext
from longspan.engine.serving.cached import Cached
from longspan.engine.serving.job import Job
from longspan.engine.serving.requests import Limits
from longspan.errors import LongspanError, PoolExhaustedError
from longspan.kv.budget import size
from longspan.sessions.session import Session

if TYPE_CHECKING:
    from longspan.engine.llm import LLM


class Holdings:
    """Sessions and contexts of one model."""

    def __init__(self, llm: LLM, limits: Limits) -> None:
        """Start with none."""
        self.llm, self.limits = llm, limits
        self.sessions: dict[str, Session] = {}
        """By name; those used last at the end."""
        self.cached = Cached(limits.cached)
        self.changed: set[str] = set()
        """Sessions that are not saved as they stand."""

    def session(self, name: str | None, *, make: bool = True) -> Session | None:
        """Return a session, from where it is saved if it is not held, or a new one if it may be made.

        Raises:
            SessionNotFoundError: there is none, and it may not be made.
            LongspanError: as `LLM.session`.
        """
        if name is None:
            return None
        if not make and name not in self.sessions:
            self.llm.store.existing(name)
        session = self.sessions.pop(name, None) or self.llm.session(name)
        self.sessions[name] = session
        return session

    def save(self, name: str) -> None:
        """Save a session if it is not saved as it stands."""
        session = self.sessions[name]
        grown = session.memory is not None and session.saved_length != session.memory.length
        if name in self.changed or grown:
            self.llm.save(session)
            self.changed.discard(name)

    def let_go(self, count: int, busy: Collection[str | None]) -> bool:
        """Save and forget those sessions not used for longest that are not busy; returns whether there was one."""
        free = [name for name in self.sessions if name not in busy][:count]
        for name in free:
            self.save(name)
            del self.sessions[name]
        return bool(free)

    def clear(self, *, save: bool) -> None:
        """Forget everything; `save`: sessions are saved before (LongspanError: one could not be, all others are)."""
        failed: list[LongspanError] = []
        for name in list(self.sessions):
            if save:
                try:
                    self.save(name)
                except LongspanError as error:
                    failed.append(error)
            del self.sessions[name]
        while self.cached.shrink():
            pass
        if failed:
            raise failed[0]

    def has_room(self, job: Job, others: Sequence[Job], busy: Collection[str | None]) -> bool:
        """Whether the KV budget has room for all that a request may take, beside what others still may.

        What is only kept gives way first. A request that could never fit is told so, and is to begin only to end.

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
        promised = sum(max(0, other.needs - sum(each.nbytes for each in other.contexts)) for other in others)
        while True:
            left = budget.left
            assert left is not None, "the budget is limited"
            if job.needs <= left - promised:
                return True
            if self.cached.shrink() or self.let_go(1, busy={*busy, job.session}):
                continue
            if busy or others:
                return False
            job.refused = PoolExhaustedError(
                f"the request may need {size(job.needs)} of the KV budget, which has {size(left)} left: raise it "
                "(--kv-budget), or ask for less text or fewer tokens"
            )
            return True

    def pages(self, jobs: Sequence[Job]) -> tuple[dict[tuple[str, str], int], int]:
        """Return how many pages are held by tier and format, and the bytes that contexts refer to."""
        contexts = [context for job in jobs for context in job.contexts]
        contexts += [each.memory for each in self.sessions.values() if isinstance(each.memory, KVContext)]
        contexts += self.cached.contexts
        pools = {id(kv.pool): kv.pool for context in contexts for kv in context.layers}
        found: dict[tuple[str, str], int] = {}
        for pool in pools.values():
            for place, count in pool.census().items():
                found[place] = found.get(place, 0) + count
        return found, sum({id(context): context.nbytes for context in contexts}.values())
