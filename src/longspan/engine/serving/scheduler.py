"""Serving many requests on one model: one thread that owns it, requests from any other, events that go back.

The thread goes round: what came in and what was cancelled, who may begin, one chunk of reading, one step of decode for
all answers that are being written. Texts become tokens, and sessions are saved, on threads beside it. It does not know
HTTP, how a request is worked on (`job.py`), whose turn it is (`queueing.py`), or how a step is made (`batch.py`).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from longspan.engine.residents import Residents
from longspan.engine.serving.handle import Handle, Wakes
from longspan.engine.serving.job import Job
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.prepared import prepare
from longspan.engine.serving.requests import Limits, Request
from longspan.engine.serving.rounds import Call, Rounds
from longspan.errors import BusyError, LongspanError, UsageError

if TYPE_CHECKING:
    from longspan.engine.llm import LLM

_T = TypeVar("_T")
_SWITCH = 0.0005
"""Seconds for which a thread may keep the interpreter while another waits."""
_LOOKED = 1.0
"""Seconds at least between two looks at sessions that nobody uses."""
_LONG = 20_000
"""Characters of a long text."""


class Scheduler:
    """Serves requests on one model. Its methods may be called from any thread."""

    def __init__(self, llm: LLM, *, limits: Limits | None = None) -> None:
        """Take the model, which nobody else may use while this is started.

        Raises:
            UsageError: a model over several ranks.
        """
        if llm.ranks is not None:
            raise UsageError("a model over several ranks answers one request at a time: serve with one process")
        self.llm, self.limits = llm, limits or Limits()
        self._there = threading.Condition()
        self._came: list[Job | Call] = []
        self._known: set[Job] = set()
        """Every request that has not ended."""
        self._metrics, self._wakes = Metrics(), Wakes()
        self._rounds = Rounds(llm, self.limits, self._metrics, self._ended, self._wake)
        self._short: ThreadPoolExecutor | None = None
        self._long: ThreadPoolExecutor | None = None
        """Where long texts become tokens, so that short ones do not wait behind them."""
        self._thread: threading.Thread | None = None
        self._closing = False
        self._switch = sys.getswitchinterval()
        self.ready = False
        """Whether the engine has begun to serve."""

    def start(self) -> None:
        """Begin to serve."""
        assert self._thread is None, "started already"
        # The engine's thread gives the interpreter up in every operation: it must not wait 5 ms for it each time.
        self._switch = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch, _SWITCH))
        self._short, self._long = (ThreadPoolExecutor(1, f"longspan-{kind}-texts") for kind in ("short", "long"))
        self._thread = threading.Thread(target=self._serve, name="longspan-engine", daemon=True)
        with self._there:
            self._closing = False
            waiting = [job for job in self._known if job.prepared is None]
        for job in waiting:
            self._prepare(job)
        self._thread.start()

    def close(self, save: bool = True, timeout: float = 0.0) -> None:
        """Stop: what waits and what is under way ends as `cancelled`, and sessions with a name are saved.

        Args:
            save: whether sessions are saved that changed since they last were.
            timeout: seconds in which requests may end by themselves first.
        """
        with self._there:
            self._closing = True
            self._there.wait_for(lambda: not self._known, timeout)
            for job in self._known:
                job.cancelled = True
            self._there.notify_all()
        if self._thread is None:
            for job in list(self._known):
                job.end()
            self._wakes.flush()
            return
        self._thread.join()
        self._thread = None
        sys.setswitchinterval(self._switch)
        for beside in (self._short, self._long):
            if beside is not None:
                beside.shutdown()
        self._rounds.close(save=save)
        self.ready = False

    def submit(self, request: Request) -> Handle:
        """Queue a request and return at once.

        Raises:
            BusyError: as many wait as the limits allow; `retry_after` says in how many seconds to ask again.
            UsageError: it asks for more than the limits allow.
        """
        limits = self.limits
        if request.n > min(limits.choices, limits.sequences):
            most = min(limits.choices, limits.sequences)
            raise UsageError(f"n is {request.n}: at most {most} answers are given to a request here")
        if limits.answer_tokens is not None and request.params.max_tokens > limits.answer_tokens:
            raise UsageError(
                f"max_tokens is {request.params.max_tokens}: at most {limits.answer_tokens} are written here"
            )
        job = Job(request, self._metrics, self._wake, self._wakes)
        with self._there:
            if self._closing:
                raise BusyError("no requests are taken any more: ask again later", 5.0)
            if self._waiting() >= limits.queue:
                self._metrics.refused += 1
                raise BusyError(f"{limits.queue} requests wait already: ask again later", self._retry_after())
            self._known.add(job)
        if self._thread is not None:
            self._prepare(job)
        return job.handle

    @property
    def residents(self) -> Residents:
        """The sessions in memory: to be looked at from any thread, to be changed by `run` alone."""
        return self._rounds.held.residents

    def run(
        self,
        work: Callable[[LLM, Residents], _T],
        session: str | None = None,
        then: Callable[[_T], _T] | None = None,
    ) -> Future[_T]:
        """Have something done on the engine's thread between two steps, such as forking a session.

        Args:
            work: called with the model and the sessions in memory, which it may change; it should be short.
            session: one that `work` needs for itself: it waits for requests on it, and they for `work` and `then`.
            then: called with what `work` returned on a thread beside the engine's: for what waits for a disk, and
                changes no pages.

        Returns:
            What the last of them returns, or what one of them raises.
        """
        future: Future[_T] = Future()
        made: list[_T] = []

        def call() -> bool:
            if not future.set_running_or_notify_cancel():
                return False
            try:
                made.append(work(self.llm, self.residents))
            except BaseException as error:
                future.set_exception(error)
                return False
            if then is None:
                future.set_result(made[0])
            return then is not None

        def follow() -> None:
            assert then is not None, "there is something to follow"
            try:
                future.set_result(then(made[0]))
            except BaseException as error:
                future.set_exception(error)

        with self._there:
            if self._closing:
                raise BusyError("nothing is done any more: ask again later", 5.0)
            self._came.append(Call(call, follow, session))
            self._there.notify_all()
        return future

    def metrics(self) -> Metrics:
        """Return a copy of the counters as they are now."""
        with self._there:
            waiting = self._waiting()
        now = copy.deepcopy(self._metrics)
        now.waiting_now = waiting
        return now

    # --- between threads ---------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._there:
            self._there.notify_all()

    def _waiting(self) -> int:
        """Return how many requests have not begun (the lock is held)."""
        return sum(not job.begun for job in self._known)

    def _retry_after(self) -> float:
        """Return in how many seconds about a tenth of the queue will have moved on."""
        seen = self._metrics.queued
        mean = seen.total / seen.count if seen.count else 1.0
        return max(1.0, round(mean / 10, 1))

    def _prepare(self, job: Job) -> None:
        beside = self._short if job.request.characters < _LONG else self._long
        assert beside is not None, "not started"
        beside.submit(self._made, job)

    def _made(self, job: Job) -> None:
        """Make tokens of a request's texts, and hand it to the engine."""
        try:
            if not job.cancelled:
                job.prepared = prepare(self.llm.model, job.request, self.limits.request_tokens)
        except LongspanError as error:
            job.fail(error)
        except Exception as error:
            job.fail(self._rounds.internal(error))
        with self._there:
            if job.prepared is None:
                job.end()
                self._known.discard(job)
            else:
                self._came.append(job)
            self._there.notify_all()
        self._wakes.flush()

    def _ended(self, job: Job) -> None:
        with self._there:
            self._known.discard(job)
            self._there.notify_all()

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._rounds.begin()
        self.ready = True
        while True:
            with self._there:
                self._there.wait_for(self._wanted, self._patience())
                if self._closing and not (self._known or self._came or len(self._rounds.queue)):
                    return
                came, self._came = self._came, []
            for each in came:
                self._rounds.queue.put(each)
            try:
                self._rounds.go_round()
            except Exception as error:
                self._rounds.fail_all(error)
            self._wakes.flush()

    def _patience(self) -> float | None:
        """Return the seconds after which there is something to do in any case; None: there is not."""
        due = self.residents.due
        return None if due is None else max(_LOOKED, due)

    def _wanted(self) -> bool:
        """Whether there is something to do."""
        rounds = self._rounds
        if self._came or rounds.reading or rounds.writing or rounds.settled():
            return True
        if self._closing and not self._known:
            return True
        # Those that wait for a save alone, or for their texts, are not worked on.
        return bool(len(rounds.queue)) and not rounds.saving
