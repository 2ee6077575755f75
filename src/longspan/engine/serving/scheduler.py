"""Who is served when: one thread that owns the model, requests that come from any other, and events that go back.

It does not know HTTP, nor how a request is worked on (`job.py`).
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from longspan.engine.serving.events import Done, Usage
from longspan.engine.serving.handle import Handle
from longspan.engine.serving.job import Job
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.requests import Limits, Request
from longspan.errors import BusyError, EngineError, LongspanError, UsageError
from longspan.sessions.session import Session

if TYPE_CHECKING:
    from longspan.engine.llm import LLM

_T = TypeVar("_T")


class Scheduler:
    """Serves requests on one model. `submit`, `run` and `metrics` may be called from any thread."""

    def __init__(self, llm: LLM, *, limits: Limits | None = None) -> None:
        """Take the model, which nobody else may use while this is started."""
        self.llm, self.limits = llm, limits or Limits()
        self._there = threading.Condition()
        self._waiting: deque[Job | Callable[[], None]] = deque()
        self._running: Job | None = None
        self._metrics = Metrics()
        self._sessions: dict[str, Session] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    # --- from any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve."""
        assert self._thread is None, "started already"
        self._thread = threading.Thread(target=self._serve, name="longspan-engine", daemon=True)
        self._thread.start()

    def close(self, save: bool = True, timeout: float | None = None) -> None:
        """Stop: what waits and what is under way ends as `cancelled`, and sessions with a name are saved.

        Args:
            save: whether they are saved.
            timeout: seconds in which requests under way may finish first; None: they are cancelled now.
        """
        until = time.perf_counter() + (timeout or 0.0)
        while timeout and time.perf_counter() < until and (self._waiting or self._running):
            time.sleep(0.01)
        with self._there:
            self._closing = True
            for each in [*self._waiting, self._running]:
                if isinstance(each, Job):
                    each.cancel()
            self._there.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if save:
            for session in self._sessions.values():
                self.llm.save(session)

    def submit(self, request: Request) -> Handle:
        """Queue a request and return at once.

        Raises:
            BusyError: as many wait as the limits allow; `retry_after` says in how many seconds to ask again.
            UsageError: it asks for more than the limits allow.
        """
        if request.n > self.limits.choices:
            raise UsageError(f"n is {request.n}: at most {self.limits.choices} answers are given to a request")
        most = self.limits.answer_tokens
        if most is not None and request.params.max_tokens > most:
            raise UsageError(f"max_tokens is {request.params.max_tokens}: at most {most} are written here")
        job = Job(request)
        with self._there:
            if self._closing:
                raise BusyError("the server is shutting down: ask again later", 5.0)
            if len(self._waiting) >= self.limits.queue:
                self._metrics.refused += 1
                raise BusyError(f"{self.limits.queue} requests wait already: ask again later", 1.0)
            self._waiting.append(job)
            self._there.notify()
        return job.handle

    def run(self, work: Callable[[LLM, dict[str, Session]], _T], session: str | None = None) -> Future[_T]:
        """Have something done on the engine's thread between two steps, such as forking or saving a session.

        Args:
            work: called with the model and the sessions in memory; it should be short.
            session: one that `work` needs for itself: it waits for requests on it, and they for `work`.

        Returns:
            What `work` returns or raises.
        """
        future: Future[_T] = Future()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(self.llm, self._sessions))
                except BaseException as error:
                    future.set_exception(error)

        with self._there:
            self._waiting.append(call)
            self._there.notify()
        return future

    def metrics(self) -> Metrics:
        """Return a copy of the counters as they are now."""
        with self._there:
            now = copy.deepcopy(self._metrics)
            now.waiting_now, now.sessions_now = len(self._waiting), len(self._sessions)
            now.writing_now = int(self._running is not None)
        return now

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._there:
                while not self._waiting and not self._closing:
                    self._there.wait()
                if not self._waiting:
                    return
                work = self._waiting.popleft()
                self._running = work if isinstance(work, Job) else None
            if isinstance(work, Job):
                self._work(work)
            else:
                work()
            self._running = None

    def _work(self, job: Job) -> None:
        left = set(range(job.request.n))
        try:
            events = job.events(self.llm, self._session(job.request.session), self._metrics)
            while not job.cancelled and (event := next(events, None)) is not None:
                job.handle.put(event)
                if isinstance(event, Done):
                    left.discard(event.index)
            events.close()
            for index in left:
                job.handle.put(Done(index, "cancelled", Usage()))
        except LongspanError as error:
            job.handle.put(error)
        except Exception as error:
            job.handle.put(EngineError(f"the engine failed on this request: {type(error).__name__}: {error}"))

    def _session(self, name: str | None) -> Session:
        if name is None:
            return Session()
        if name not in self._sessions:
            self._sessions[name] = self.llm.session(name)
        return self._sessions[name]
