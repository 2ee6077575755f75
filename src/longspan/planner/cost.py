"""What questions to a long text cost: sent whole every time, kept in a session, searched, or both; money and seconds.

Four ways to answer questions about the same tokens:

- `whole`: all of them with every question;
- `cached`: read once, then a hosted model's cache or a saved session holds them;
- `retrieval`: made searchable once, then a few chunks with every question;
- `hybrid`: searched as well, but more chunks, which a long context reads.

Hosted models cost by the token, one's own GPU by the second of a plan. It does not know how good the answers are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from longspan.errors import UsageError
from longspan.planner.plan import Plan, plan
from longspan.planner.prices import Prices

WAYS = ("whole", "cached", "retrieval", "hybrid")
_DISK = 2e9
"""Bytes a second at which a saved session comes back: one NVMe disk."""
_MOST = 10**9
"""Questions up to which a break-even is searched for."""
_MANY = 10**12
"""Of tokens, questions and chunks, as many as anybody may ask for."""


@dataclass(frozen=True)
class Job:
    """What is asked."""

    tokens: int
    """Of the text."""
    queries: int
    chunk: int = 512
    """Tokens of what retrieval finds."""
    top_k: int = 5
    """How many chunks of those it gives to the model."""
    wide: int = 8
    """How many times more the hybrid gives."""
    question: int = 100
    """Tokens of a question."""
    answer: int = 500
    """Tokens of an answer."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name in ("tokens", "queries", "chunk", "top_k", "wide"):
            if not 1 <= getattr(self, name) <= _MANY:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1 and at most {_MANY:,}")
        if not 0 <= min(self.question, self.answer) <= max(self.question, self.answer) <= _MANY:
            raise UsageError(f"question and answer are tokens: give 0 to {_MANY:,}")

    def read(self, way: str) -> int:
        """Return the tokens of text that a question is given."""
        found = self.top_k * self.chunk * (self.wide if way == "hybrid" else 1)
        return self.tokens if way in ("whole", "cached") else min(self.tokens, found)


@dataclass(frozen=True)
class Spent:
    """What something takes."""

    dollars: float
    seconds: float

    def __add__(self, other: Spent) -> Spent:
        """Return both together."""
        return Spent(self.dollars + other.dollars, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Spent:
        """Return it so many times."""
        return Spent(self.dollars * times, self.seconds * times)


class Payer(Protocol):
    """Who is paid: a hosted model, or one's own GPU."""

    @property
    def name(self) -> str:
        """Who that is, in words."""

    def once(self, job: Job, way: str) -> Spent:
        """Return what is spent before the first question."""

    def each(self, job: Job, way: str) -> Spent:
        """Return what every question takes."""


@dataclass(frozen=True)
class Hosted:
    """A hosted model, by its prices."""

    prices: Prices
    embedding: float
    """Dollars for a million tokens made searchable."""
    prefill: float = 10_000.0
    """Tokens a second that it reads: an assumption, since prices say nothing of it."""
    decode: float = 60.0
    """Tokens a second that it writes: likewise."""

    @property
    def name(self) -> str:
        """See `Payer`."""
        dated = f", prices of {self.prices.date}" if self.prices.date else ""
        return f"{self.prices.name}{dated}"

    def once(self, job: Job, way: str) -> Spent:
        """See `Payer`: a cache is written with the first question, whose text then is not counted again."""
        if way in ("retrieval", "hybrid"):
            return Spent(job.tokens * self.embedding / 1e6, 0.0)
        if way == "cached":
            written = self.prices.request(job.tokens, 0, 0, write=True)
            return Spent(written, job.tokens / self.prefill)
        return Spent(0.0, 0.0)

    def each(self, job: Job, way: str) -> Spent:
        """See `Payer`."""
        read = job.read(way)
        held = read if way == "cached" else 0
        fresh = read - held + job.question
        return Spent(self.prices.request(fresh, held, job.answer), fresh / self.prefill + job.answer / self.decode)


@dataclass(frozen=True)
class Own:
    """One's own GPU, by the hour: a plan says how long it is busy, and its slower end counts."""

    model: str
    gpu: str
    hour: float
    """Dollars for each GPU."""
    attention: str = "dense"
    gpus: int = 1

    @property
    def name(self) -> str:
        """See `Payer`."""
        count = f"{self.gpus} x " if self.gpus > 1 else ""
        return f"{self.model} on {count}{self.gpu} at ${self.hour:g} an hour"

    def once(self, job: Job, way: str) -> Spent:
        """See `Payer`."""
        # An index of words takes seconds on a CPU: nothing that a GPU is paid for.
        return self._spent(self._plan(job.tokens).prefill.high if way == "cached" else 0.0)

    def each(self, job: Job, way: str) -> Spent:
        """See `Payer`."""
        read = job.read(way)
        made = self._plan(read + job.question)
        answer = job.answer * made.step.high
        if way == "cached":
            asked = self._plan(max(1, job.question)).prefill.high
            return self._spent(made.memory.kv * self.gpus / _DISK + asked + answer)
        return self._spent(made.prefill.high + answer)

    def lacking(self, job: Job, way: str) -> float:
        """Return the bytes by which a GPU is too small for a question that is asked so; 0: it fits."""
        return max(0.0, -self._plan(job.read(way) + job.question).spare)

    def _plan(self, tokens: int) -> Plan:
        return plan(self.model, max(1, tokens), attention=self.attention, gpu=self.gpu, gpus=self.gpus)

    def _spent(self, seconds: float) -> Spent:
        return Spent(seconds * self.hour * self.gpus / 3600, seconds)


@dataclass(frozen=True)
class Line:
    """One way to answer, and what it takes."""

    way: str
    once: Spent
    each: Spent
    total: Spent
    read: int
    """Tokens of text that a question is given."""

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        parts = {"once": self.once, "each": self.each, "total": self.total}
        return {
            "way": self.way,
            "tokens_read": self.read,
            **{
                f"{name}_{what}": getattr(part, what) for name, part in parts.items() for what in ("dollars", "seconds")
            },
        }


def lines(job: Job, payer: Payer, *, daily: bool = False) -> list[Line]:
    """Return what every way takes.

    Args:
        job: what is asked.
        payer: who is paid.
        daily: whether the same comes every day: then what is made searchable once is no part of a day, and a cache is
            written anew.
    """
    found = []
    for way in WAYS:
        once, each = payer.once(job, way), payer.each(job, way)
        kept = daily and way in ("retrieval", "hybrid")
        found.append(Line(way, once, each, each * job.queries + (Spent(0, 0) if kept else once), job.read(way)))
    return found


def by_queries(job: Job, payer: Payer, counts: Sequence[int]) -> dict[str, list[float]]:
    """Return the dollars of every way for growing numbers of questions."""
    found = lines(job, payer)
    return {line.way: [(line.once + line.each * count).dollars for count in counts] for line in found}


def break_evens(job: Job, payer: Payer) -> list[str]:
    """Return in sentences where one way becomes cheaper than another."""
    told = []
    found = {line.way: line for line in lines(job, payer)}
    for cheaper, other in (("cached", "whole"), ("retrieval", "whole"), ("retrieval", "cached"), ("hybrid", "cached")):
        a, b = found[cheaper], found[other]
        count = _crossing(a.once.dollars - b.once.dollars, b.each.dollars - a.each.dollars)
        if count is None:
            told.append(f"{cheaper} never costs less than {other}")
        elif count <= 1:
            told.append(f"{cheaper} costs less than {other} from the first question on")
        else:
            told.append(f"{cheaper} costs less than {other} from {count:,} questions on")
    alike = _alike(job, payer)
    if alike is not None:
        told.append(f"a question to the whole text costs no more than retrieval up to {alike:,} tokens")
    return told


def _crossing(ahead: float, gain: float) -> int | None:
    """Return how many questions make up for what was spent before; None: never."""
    if ahead < 0 or (ahead == 0 and gain > 0):
        return 1 if gain >= 0 else None
    if gain <= 0:
        return None
    count = math.floor(ahead / gain) + 1
    return count if count <= _MOST else None


def _alike(job: Job, payer: Payer) -> int | None:
    """Return the longest text of which all costs no more a question than what retrieval finds in it."""
    searched = payer.each(job, "retrieval").dollars
    low, high = 1, job.tokens
    if payer.each(replace(job, tokens=1), "whole").dollars > searched:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if payer.each(replace(job, tokens=middle), "whole").dollars <= searched * (1 + 1e-9):
            low = middle
        else:
            high = middle - 1
    return low


def rented(job: Job, hosted: Payer, own: Own, way: str = "cached") -> int | None:
    """Return the questions a day from which a GPU that is rented day and night costs less than a hosted model.

    None: it never does, since the GPU can't answer as many.
    """
    day = 24 * own.hour * own.gpus
    each = hosted.each(job, way).dollars
    count = math.ceil(day / each) if each > 0 else _MOST
    return count if count * own.each(job, way).seconds <= 86_400 else None
