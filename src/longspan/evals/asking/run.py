"""Asks the questions that a journal does not hold yet, and tells how far it is: a running score and the time left.

Questions take turns: the first of every task, length and asker, then the second, so that a run that ends early has
asked each about as often; what an asker answers together comes together. It does not know who answers, nor what is
asked.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from typing import Any

from longspan.errors import UsageError
from longspan.evals.asking.asker import Asker, Reply, Tick
from longspan.evals.asking.readers import reading
from longspan.evals.asking.rows import KEY, Key, Row, answered, contender, row_of
from longspan.evals.journal import Entry, Journal
from longspan.evals.progress import duration
from longspan.evals.questions.example import Eval, Example
from longspan.evals.questions.making import example
from longspan.evals.questions.scoring import score
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources

_MOST = 1_000_000
"""Questions of one plan, which is kept in memory."""

Told = Callable[[str], Tick]
"""Told what is being asked; returns what is told how far reading is."""


@dataclass(frozen=True)
class Given:
    """What is asked for."""

    evaluation: Eval
    tasks: list[str]
    lengths: list[int]
    questions: int
    """Of each task at each length."""
    seed: int
    sources: Sources = field(default_factory=Sources)
    setup: Setup = field(default_factory=Setup)


@dataclass(frozen=True)
class Asked:
    """A question, and who is asked."""

    key: Key
    asker: Asker


def plan(given: Given, askers: Callable[[int], Sequence[Asker]]) -> list[Asked]:
    """Return every question that is asked for, each once, in the order of asking.

    Args:
        given: what is asked for.
        askers: returns who is asked at a length.

    Raises:
        UsageError: a setup that is none for a task, an asker that can't measure what a task needs, or more questions
            than a plan holds.
    """
    evaluation = given.evaluation
    given.setup.check(evaluation, given.tasks)
    at = {length: [reading(asker, given.setup.reading) for asker in askers(length)] for length in given.lengths}
    if any(evaluation.tasks[task].scoring == "probability" for task in given.tasks):
        for each in (each for found in at.values() for each in found if not each.measures):
            raise UsageError(
                f"{each.identity.attention} gives no probability of a text, which {evaluation.name} measures: ask a "
                "model that runs here, with an attention that keeps keys and values"
            )
    if (count := given.questions * len(given.tasks) * sum(map(len, at.values()))) > _MOST:
        raise UsageError(f"{count:,} questions are asked for at once: ask at most {_MOST:,}, with fewer --questions")
    found: dict[Key, Asked] = {}
    for number in range(given.questions):
        for length in given.lengths:
            for task in given.tasks:
                for asker in at[length]:
                    key = _key(given, asker, task, length, number)
                    found.setdefault(key, Asked(key, asker))
    return list(found.values())


def run(
    given: Given,
    asked: Sequence[Asked],
    journal: Journal,
    about: dict[str, Any],
    tell: Callable[[str], None],
    told: Told = lambda _: lambda _, __: None,
    *,
    elsewhere: Iterable[Entry] = (),
    until: float = math.inf,
) -> int:
    """Ask what the journal does not hold yet, and return how many questions are left.

    Args:
        given: that of the plan.
        asked: from `plan`.
        journal: gets a row a question.
        about: the environment of this run; its `run` is made here.
        tell: told the progress, a line a question.
        told: see `Told`.
        elsewhere: rows of other journals, which are not asked again.
        until: when to stop, in seconds of `time.monotonic`; one question, or those that are answered together with it,
            are asked before the first look at the clock.
    """
    done = answered([*journal.entries, *elsewhere])
    left = [each for each in asked if each.key not in done]
    if not left:
        return 0
    progress = _Progress([each.key for each in asked], tell)
    for each in asked:
        if each.key in done:
            progress.before(row_of(done[each.key]))
    name = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}-{secrets.token_hex(3)}"
    journal.begin({"run": name, **about})
    beyond: set[str] = set()
    count = len(left)
    for group in _answers(given, left, name, told, progress):
        for each, row, reply in group:
            if reply.beyond and reply.attention not in beyond:
                beyond.add(reply.attention)
                tell(f"{reply.attention} reads beyond what {each.asker.identity.model} was trained on: expect nonsense")
            journal.append(asdict(row))
            progress.asked(row)
            count -= 1
        if time.monotonic() >= until:
            break
    return count


def _key(given: Given, asker: Asker, task: str, length: int, number: int) -> Key:
    evaluation, who = given.evaluation, asker.identity
    made_of = (evaluation.version, given.sources.digest, asker.counted_by, asker.template, evaluation.tasks[task])
    return Key(
        eval=evaluation.name,
        task=task,
        length=length,
        seed=given.seed,
        question=number,
        setup=given.setup.describe(),
        questions=hashlib.blake2b(repr(made_of).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest(),
        **{name: getattr(who, name) for name in KEY if hasattr(who, name)},
    )


Answered = tuple[Asked, Row, Reply]


def _answers(
    given: Given, left: Sequence[Asked], run: str, told: Told, progress: _Progress
) -> Iterator[list[Answered]]:
    """Yield questions with their rows as they are answered; several at once where askers allow it."""

    def made(each: Asked) -> tuple[Example, float]:
        key, asker, began = each.key, each.asker, time.perf_counter()
        found = example(
            given.evaluation, key.task, asker.tokens, key.length, key.question, key.seed,
            template=asker.template, sources=given.sources, setup=given.setup,
        )  # fmt: skip
        return found, time.perf_counter() - began

    def answer(each: Asked, question: Example, making: float) -> list[Answered]:
        began = time.perf_counter()
        reply = each.asker.ask(question, told(progress.told(each.key)))
        return [(each, _row(given, each, run, question, reply, making + time.perf_counter() - began), reply)]

    def answers(group: Sequence[Asked]) -> list[Answered]:
        if len(group) == 1:
            return answer(group[0], *made(group[0]))
        began = time.perf_counter()
        questions = [made(each)[0] for each in group]
        replies = group[0].asker.ask_all(questions, told(progress.told(group[0].key)))
        seconds = (time.perf_counter() - began) / len(group)
        return [
            (each, _row(given, each, run, question, reply, seconds), reply)
            for each, question, reply in zip(group, questions, replies, strict=True)
        ]

    workers = max(each.asker.parallel for each in left)
    if workers == 1:
        yield from map(answers, _groups(left))
        return
    pool, waiting, running = ThreadPoolExecutor(workers), iter(left), set[Future[list[Answered]]]()
    try:
        while True:
            # Questions are made here, one by one: tokenizers need not bear several threads.
            while len(running) < workers and (following := next(waiting, None)) is not None:
                running.add(pool.submit(answer, following, *made(following)))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for one in finished:
                yield one.result()
    finally:
        # What is under way is waited for by nobody who stopped.
        pool.shutdown(wait=False, cancel_futures=True)


def _groups(left: Sequence[Asked]) -> Iterator[list[Asked]]:
    """Yield the questions in their order, each with the next ones that its asker answers together with it."""
    of: dict[int, deque[int]] = {}
    for number, each in enumerate(left):
        of.setdefault(id(each.asker), deque()).append(number)
    for number, each in enumerate(left):
        queue = of[id(each.asker)]
        if queue and queue[0] == number:
            yield [left[queue.popleft()] for _ in range(min(each.asker.together, len(queue)))]


def _row(given: Given, each: Asked, run: str, made: Example, reply: Reply, seconds: float) -> Row:
    family = given.evaluation.tasks[each.key.task]
    measures = {name: float(value) for name, value in reply.measures.items()}
    if reply.nll is not None:
        measures["nll"] = reply.nll
    points = 0.0
    if not reply.error:
        points = math.exp(-reply.nll) if reply.nll is not None else score(reply.text, made.outputs, made.scoring)
    later = reply.decoded_tokens - 1  # the first comes with the question
    return Row(
        run=run,
        model=each.asker.identity.model,
        **asdict(each.key),
        parameters=asdict(family) if is_dataclass(family) and not isinstance(family, type) else {},
        tokens=made.tokens,
        depths=list(made.depths),
        scoring=made.scoring,
        score=points,
        chance=made.chance,
        error=reply.error,
        read_by=reply.attention,
        read_tokens=reply.read_tokens,
        read_tokens_per_s=round(reply.read_tokens / reply.read_seconds, 1) if reply.read_seconds else 0.0,
        kept_bytes=reply.kept_bytes,
        first_token_s=round(reply.first_token_seconds, 3),
        decode_tokens_per_s=round(later / reply.decode_seconds, 1) if later > 0 and reply.decode_seconds else 0.0,
        seconds=round(seconds, 3),
        measures=measures,
        answer=reply.text.strip(),
        wanted=list(made.outputs),
    )


class _Progress:
    """Tells a line a question: the score so far of its contender, task and length, speed, and time left."""

    def __init__(self, keys: Sequence[Key], tell: Callable[[str], None]) -> None:
        """Begin with nothing done of these questions."""
        self._tell, self._count = tell, len(keys)
        self._several = len({contender(key) for key in keys}) > 1
        self._tokens = sum(key.length for key in keys)
        self._rows: dict[tuple[str, str, int], list[Row]] = {}
        self._all: list[Row] = []
        self._done = self._passed = 0
        self._since = time.perf_counter()

    def told(self, key: Key) -> str:
        """Return what is being asked, with the score of all questions so far."""
        mean = f", {_mean(self._all)}" if self._all else ""
        return f"{self._done}/{self._count}{mean}: {self._named(key)}"

    def before(self, row: Row) -> None:
        """Count a question that was answered in an earlier run."""
        self._rows.setdefault((contender(row), row.task, row.length), []).append(row)
        self._all.append(row)
        self._done += 1
        self._tokens -= row.length

    def asked(self, row: Row) -> None:
        """Count an answer, and tell how far it is."""
        self.before(row)
        self._passed += row.length
        # Making, reading and answering a question all take time in proportion to its tokens, nearly.
        left = (time.perf_counter() - self._since) / self._passed * self._tokens
        group = self._rows[contender(row), row.task, row.length]
        speed = f", read at {row.read_tokens_per_s:,.0f} tokens/s" if row.read_tokens_per_s else ""
        failed = f", no answer: {row.error}" if row.error else ""
        self._tell(
            f"[{self._done}/{self._count}] {self._named(row)}: {_mean(group)} of {len(group)}{speed}, "
            f"about {duration(left)} left{failed}"
        )

    def _named(self, asked: Key) -> str:
        return (f"{contender(asked)} " if self._several else "") + f"{asked.task} {asked.length}"


def _mean(group: Sequence[Row]) -> str:
    """Return the score of rows in a word, or the perplexity of texts."""
    nlls = [row.measures["nll"] for row in group if "nll" in row.measures]
    if nlls:
        return f"perplexity {math.exp(sum(nlls) / len(nlls)):.2f}"
    return f"{100 * sum(row.score for row in group) / len(group):.0f} %"
