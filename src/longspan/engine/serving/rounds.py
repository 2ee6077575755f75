"""One round of the engine after another: who begins, who reads a chunk, a step for all who are answered, who has ended.

Everything here runs on the engine's thread, but for saving, which a thread beside it does while the session is still
locked. It does not know where requests come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from longspan import settings
from longspan.engine.serving.batch import Batch
from longspan.engine.serving.choice import Choice
from longspan.engine.serving.drawing import draw
from longspan.engine.serving.holdings import Holdings
from longspan.engine.serving.job import Job
from longspan.engine.serving.metrics import Metrics
from longspan.engine.serving.pace import Crowd, Pace
from longspan.engine.serving.queueing import WRITTEN, FairQueue
from longspan.engine.serving.requests import Limits
from longspan.errors import EngineError, LongspanError, PoolExhaustedError

if TYPE_CHECKING:
    from longspan.engine.llm import LLM

_SHORT = 512
"""Tokens of a request that need not wait for one that reads long documents to end."""
_COUNTED = 1.0
"""Seconds between two counts of all pages."""


class Call:
    """Something else that is to be done between two steps, and then, while its session is locked, beside them."""

    key, priority = "\0call", 1 << 30

    def __init__(self, work: Callable[[], bool], then: Callable[[], None], session: str | None) -> None:
        """Take what is done between steps, which says whether `then` is to follow, and the session that is locked."""
        self.work, self.then, self.session = work, then, session


class Rounds:
    """The requests under way, and what they share."""

    def __init__(
        self, llm: LLM, limits: Limits, metrics: Metrics, ended: Callable[[Job], None], wake: Callable[[], None]
    ) -> None:
        """Take the model, how much is taken on, what is counted, who hears of ends, and what wakes the engine."""
        self.llm, self.limits, self.metrics, self._ended, self._wake = llm, limits, metrics, ended, wake
        self.queue: FairQueue[Job | Call] = FairQueue()
        self.reading: list[Job] = []
        self.writing: list[Job] = []
        self.saving: list[tuple[Job | Call, Future[None]]] = []
        """What waits for a disk, with its session locked."""
        self.held = Holdings(llm, limits)
        self._steps: dict[Job, Iterator[int]] = {}
        self._batch, self._pace = Batch(llm.model), Pace(limits.step_seconds)
        self._crowd = Crowd(limits.token_seconds, limits.sequences)
        self._saver: ThreadPoolExecutor | None = None
        self._round, self._looked = 0, 0.0

    def begin(self) -> None:
        """Look for what would hold up answers later, and leave a core to the threads beside this one.

        Where all cores compute, one that also runs an event loop or a client keeps the others waiting at the end of
        every operation: on two cores a tiny model's step took 24 ms instead of one.
        """
        if self.llm.model.device.type == "cpu" and settings.threads() is None:
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
        self._saver = ThreadPoolExecutor(1, "longspan-saves")
        self.llm.heads_or_none()

    def close(self, *, save: bool) -> None:
        """Let go of everything; `save`: once sessions with a name are saved."""
        if self._saver is not None:
            self._saver.shutdown()
        self.held.clear(save=save)
        self._count_pages()

    def go_round(self) -> None:
        """Do a little of everything."""
        self._drop_cancelled()
        self._admit()
        self._pace.answering = bool(self.writing)
        if self.reading:
            self._read()
        if self.writing:
            self._write()
        self._settle()
        self._count()

    def fail_all(self, error: Exception) -> None:
        """End every request under way after an error of ours, so that the next ones are served."""
        for job in (*self.reading, *self.writing):
            with suppress(Exception):
                self._end(job, error)
        self._batch = Batch(self.llm.model)

    def settled(self) -> bool:
        """Whether something was saved that nobody has looked at yet."""
        return any(future.done() for _, future in self.saving)

    @staticmethod
    def internal(error: BaseException) -> EngineError:
        """Return what is told of an error that nobody should have met."""
        return EngineError(f"the engine failed on this request: {type(error).__name__}: {error}")

    # --- who begins --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (item := self.queue.take(self._fits)) is not None:
            if isinstance(item, Call):
                if item.work():
                    self._beside(item, item.then)
                else:
                    self.queue.done(item)
                continue
            item.begun = True
            self.metrics.queued.observe(time.perf_counter() - item.submitted)
            try:
                session = None
                if item.session is not None:
                    session = self.held.session(item.session, make=item.request.makes_session)
                    item.holds_session = True
                most = partial(self._pace.most, short=item.left <= _SHORT)
                self._steps[item] = item.reading(self.llm, session, self.held.cached, most)
                self.reading.append(item)
            except Exception as error:
                self._fail(item, error)

    def _fits(self, item: Job | Call) -> bool | None:
        if isinstance(item, Call):
            return True
        assert item.prepared is not None, "texts are tokens by now"
        under_way = sum(job.request.n for job in (*self.reading, *self.writing))
        if under_way and under_way + item.request.n > self.limits.sequences:
            return False
        answers = sum(job.request.n for job in (*self.reading, *self.writing) if not job.request.reads_only)
        if not item.request.reads_only and not self._crowd.fits(answers, item.request.n):
            return None  # texts may be read meanwhile
        if len(self.reading) >= self.limits.reading and item.prepared.tokens > _SHORT:
            return None  # short ones need not wait behind it
        item.left = item.prepared.tokens
        return self.held.has_room(item, (*self.reading, *self.writing), self.queue.busy)

    # --- reading and writing -----------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read a chunk: of the key that was served least, by turns for who came first and for who is done soonest."""
        jobs = [job for job in self.queue.least_served(self.reading) if isinstance(job, Job)]
        self._round += 1
        job = min(jobs, key=lambda each: each.left) if self._round % 2 else jobs[0]
        started = time.perf_counter()
        try:
            if job.refused is not None:
                raise job.refused
            count = next(self._steps[job], None)
        except Exception as error:
            self._end(job, error)
            return
        if count is None:
            del self._steps[job]
            self.reading.remove(job)
            if job.request.reads_only:
                self.reading.append(job)
                self._end(job)
                return
            self.writing.append(job)
            try:
                for choice in job.choices:
                    if choice.reason is not None:
                        self._choice_ended(job, choice)
            except Exception as error:
                self._end(job, error)
                return
            self._ended_if_all(job)
            return
        self.metrics.read_tokens += count
        self.queue.serve(job.key, count)
        self._pace.read(count, time.perf_counter() - started)

    def _write(self) -> None:
        """Make one step for all answers."""
        open_ = [(job, choice) for job in self.writing for choice in job.choices if choice.reason is None]
        started = time.perf_counter()
        try:
            contexts = [choice.context for _, choice in open_]
            logits, failed = self._batch.step(contexts, [choice.tokens[-1] for _, choice in open_])
        except Exception as error:
            for job in list(self.writing):
                self._end(job, error)
            return
        drawn = draw(logits, [choice for _, choice in open_]) if logits.numel() else []
        now = time.perf_counter()
        if waited := [now - job.last for job in self.writing if job.last]:
            self._crowd.stepped(max(waited), len(open_))
        for at, (job, choice) in enumerate(open_):
            if at in failed:
                self._end(job, failed[at])
                continue
            if job not in self.writing:
                continue  # another answer of it has failed
            try:
                if isinstance(said := drawn[at], Exception):
                    raise said
                job.write(choice, *said)
                if choice.reason is not None:
                    self._choice_ended(job, choice)
            except Exception as error:
                self._end(job, error)
                continue
            self.queue.serve(job.key, WRITTEN)
            self.metrics.between_tokens.observe(now - job.last)
        for job in list(self.writing):
            job.last = now
            self._ended_if_all(job)
        self.metrics.steps += 1
        self._pace.stepped(time.perf_counter() - started)

    def _choice_ended(self, job: Job, choice: Choice) -> None:
        self._left(choice)
        job.ended(self.llm, choice)

    def _left(self, choice: Choice) -> None:
        """Have an answer's context hold what it has read, once it has ended."""
        with suppress(PoolExhaustedError):  # what is not held need not be taken back
            self._batch.leave(choice.context)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _ended_if_all(self, job: Job) -> None:
        if job in self.writing and all(choice.reason is not None for choice in job.choices):
            self._end(job)

    def _drop_cancelled(self) -> None:
        for job in [job for job in (*self.reading, *self.writing) if job.cancelled]:
            self._end(job)
        for item in [item for item in self.queue if isinstance(item, Job) and item.cancelled]:
            self.queue.remove(item)
            item.end()
            self.metrics.queued.observe(time.perf_counter() - item.submitted)
            self._ended(item)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """End a request wherever it is; what its session has read stays, and is saved."""
        if (steps := self._steps.pop(job, None)) is not None:
            getattr(steps, "close", lambda: None)()
        for jobs in (self.reading, self.writing):
            if job in jobs:
                jobs.remove(job)
        try:
            for choice in job.choices:
                self._left(choice)
            job.close(self.held.cached)
        except Exception as wrong:
            error = error or wrong
        name = job.session if job.changed_session and job.holds_session else None
        if name is not None:
            self.held.residents.change(name)
        if error is not None:
            self._fail(job, error)
            return
        if name is None:
            self._over(job)
            return
        if not job.request.reads_only:
            job.end()  # an answer need not wait for the disk
        self._beside(job, partial(self.held.residents.save, name))

    def _beside(self, item: Job | Call, work: Callable[[], None]) -> None:
        """Have work done that waits for a disk."""
        assert self._saver is not None, "begin() was not called"
        future = self._saver.submit(work)
        self.saving.append((item, future))
        future.add_done_callback(lambda _: self._wake())

    def _fail(self, job: Job, error: Exception) -> None:
        job.fail(error if isinstance(error, LongspanError) else self.internal(error))
        self._over(job)

    def _settle(self) -> None:
        """End those whose session was saved."""
        for item, future in [pair for pair in self.saving if pair[1].done()]:
            self.saving.remove((item, future))
            if isinstance(item, Call):
                self.queue.done(item)
                continue
            error = future.exception()
            if error is not None and item.request.reads_only:
                item.fail(error if isinstance(error, LongspanError) else self.internal(error))
            self._over(item)

    def _over(self, job: Job) -> None:
        job.end()
        if job.holds_session and job.session is not None:
            job.holds_session = False
            self.held.residents.release(job.session, changed=False)
        self.queue.done(job)
        self._ended(job)

    # --- counting ----------------------------------------------------------------------------------------------------

    def _count(self) -> None:
        now = self.metrics
        now.reading_now, now.sessions_now = len(self.reading), len(self.held.residents)
        now.cached_now = len(self.held.cached)
        now.writing_now = sum(choice.reason is None for job in self.writing for choice in job.choices)
        if time.perf_counter() - self._looked > _COUNTED or not (self.reading or self.writing):
            self._count_pages()

    def _count_pages(self) -> None:
        self._looked = time.perf_counter()
        residents = self.held.residents
        residents.tidy()
        self.metrics.session_bytes_now = {"device": residents.nbytes, "host": residents.host_bytes}
        self.metrics.session_moves = residents.moves.as_json()
        self.metrics.pages_now, self.metrics.kv_bytes_now = self.held.pages((*self.reading, *self.writing))
