"""Runs a comparison of ways to compress: what a journal does not hold yet, way by way, and tells how far it is.

Ways come in the order they are given, so that a run that ends early has measured the first of them. Who measures:
`compress_work.py` (ours), `peers/` (theirs).
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longspan.attention import make
from longspan.errors import UsageError
from longspan.evals.compress import DENSE, Case, Outcome, Row, Theirs, row
from longspan.evals.compress_ours import Ours, Way
from longspan.evals.compress_work import Copy, Here, Measurer, Presses
from longspan.evals.journal import Journal
from longspan.evals.progress import duration
from longspan.hf.model import CausalModel
from longspan.peers.process import Peer

Plan = tuple[str, str, float]
"""Who, which way, at which ratio."""

OURS = "longspan"

_SMALL = "int2:keys=3,residual=0"
"""The smallest format whose loss is small: 3 bits for keys, 2 for values, the first page exact."""

WAYS = (
    _SMALL, f"kvzip+{_SMALL}", "int4", "kvzip", "kvzip+int4:residual=0", "snapkv", "expected", "keydiff:every=0",
    "streaming", f"keydiff:every=0+{_SMALL}", f"expected+{_SMALL}", f"snapkv+{_SMALL}", "snapkv:heads=adaptive",
    "kvzip:heads=adaptive", "kvzip:heads=same", "expected+int4:residual=0", "snapkv+int4:residual=0", "h2o:every=0",
    "rocketkv", f"streaming:sinks=64+{_SMALL}", "kvzip+int2:residual=0",
    "expected:heads=adaptive", "int8", "fp8", f"h2o:every=0+{_SMALL}", "int2:residual=0", "snapkv:when=question",
    "rocketkv:when=question", "quest:budget=1024+int4", "sparq:budget=1024+int4", f"rocketkv+{_SMALL}",
)  # fmt: skip
"""Ours, where none are named, those that promise most first: both together, then methods and formats alone."""

PRESSES = {
    "kvpress": (
        "expected_attention", "streaming_llm", "keydiff", "snapkv", "kvzip", "ada_snapkv", "ada_expected_attention",
        "lagkv", "tova", "pyramidkv", "observed_attention", "knorm",
    ),
}  # fmt: skip
"""A peer's, where none are named."""


@dataclass(frozen=True)
class Given:
    """What is compared."""

    ways: Sequence[str]
    presses: Sequence[str]
    ratios: Sequence[float]
    length: int
    greedy: int
    """Tokens of dense's own continuation of each text."""
    about: dict[str, Any]
    """What the cases were made of: rows of other cases are no part of this comparison."""
    minutes: float | None = None
    """After which no row is begun; None: all are."""


def run(
    model: CausalModel,
    peers: Sequence[Peer],
    given: Given,
    cases: Sequence[Case],
    journal: Journal,
    tell: Callable[[str], None],
    copies: Sequence[Copy] = (),
) -> list[Row]:
    """Return a row a way and ratio, dense first; those of the journal are not measured again.

    Peers (copies of one, each a process) work side by side with ours, a row each at a time; so do copies of ours, a way
    each. A way that can't keep so little, or fails, is left out and named; so is, once the time is over, what was not
    reached.
    """
    rows = {
        (r["who"], r["way"], r["ratio"]): Row(**{**r, "text_nlls": tuple(r.get("text_nlls", ()))})
        for r in (entry.row["row"] for entry in journal.entries if entry.row["of"] == given.about)
    }
    board = _Board(given, cases, journal, tell, rows)
    ours = [(OURS, way, ratio) for way in given.ways for ratio in given.ratios]
    theirs = [(peer.name, press, ratio) for peer in peers[:1] for press in given.presses for ratio in given.ratios]
    first = [(OURS, DENSE, 1.0), *((peer.name, DENSE, 1.0) for peer in peers[:1])]
    board.left = sum(plan not in rows for plan in [*first, *ours, *theirs])
    dense = Ours(model, Way(make(DENSE)))
    for plan in first:
        if plan not in rows:
            runner = dense if plan[0] == OURS else Theirs(peers[0], model, "", 1.0)
            follows = board.continuations(dense)
            board.take(plan, "dense", runner.run(cases, follows))
        _alike([row for key, row in rows.items() if key in first])
    own = [[plan for plan in ours if plan[1] == way and plan not in rows] for way in dict.fromkeys(given.ways)]
    waiting = [plan for plan in theirs if plan not in rows]
    if waiting or any(own):
        _measured(model, peers, copies, own, waiting, board, board.continuations(dense))
    missing = [plan for plan in [*ours, *theirs] if plan not in rows and plan not in board.left_out]
    if missing:
        within = "" if given.minutes is None else f" in {given.minutes:g} minutes"
        tell(f"{len(missing)} rows were not reached{within}: the same command goes on from --out")
    return [rows[plan] for plan in [*first, *ours, *theirs] if plan in rows]


@dataclass(frozen=True)
class _Found:
    """What a process found of one plan."""

    plan: Plan
    options: str = ""
    outcomes: Sequence[Outcome] = ()
    error: UsageError | None = None
    """Why there are none."""


def _measured(
    model: CausalModel,
    peers: Sequence[Peer],
    copies: Sequence[Copy],
    own: Sequence[Sequence[Plan]],
    theirs: Sequence[Plan],
    board: _Board,
    follows: Sequence[Sequence[int]],
) -> None:
    """Measure plans, each group of `own` (the ratios of one way) by one process, and put them on the board."""
    cases, length = board.cases, board.given.length
    found: queue.SimpleQueue[_Found | BaseException | None] = queue.SimpleQueue()
    lock = threading.Lock()
    ways, presses = iter([group for group in own if group]), iter([[plan] for plan in theirs])

    def following(groups: Iterator[Sequence[Plan]]) -> Iterator[Plan]:
        """Yield plans while there is time, those of a group all to the same caller."""
        while True:
            with lock:
                group = next(groups, ())
            for plan in group:
                if board.late:
                    return
                yield plan
            if not group:
                return

    def work(groups: Iterator[Sequence[Plan]], measurer: Measurer, begin: Callable[[], object]) -> None:
        try:
            begin()
            for plan in following(groups):
                found.put(_measure(measurer, plan))
                if measurer.ended:
                    break
        except BaseException as error:  # told where rows are taken
            found.put(error)
        found.put(None)

    workers: list[tuple[Iterator[Sequence[Plan]], Measurer, Callable[[], object]]] = [
        (presses, Presses(peer, model, cases, follows), lambda: None) for peer in (peers if theirs else ())
    ]
    workers += [(ways, copy, functools.partial(copy.begin, length, cases, follows)) for copy in copies]
    for worker in workers:
        threading.Thread(target=work, args=worker, daemon=True).start()
    here, left = Here(model, length, cases, follows), len(workers)
    for plan in following(ways):
        board.found(_measure(here, plan))
        while not found.empty():
            left -= board.found(found.get())
    while left:
        left -= board.found(found.get())


def _measure(measurer: Measurer, plan: Plan) -> _Found:
    """Return what came of a plan, or why it is left out: one that fails ends no others."""
    try:
        return _Found(plan, *measurer.measure(plan[1], plan[2]))
    except UsageError as error:
        return _Found(plan, error=error)
    except Exception as error:
        return _Found(plan, error=UsageError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


class _Board:
    """The rows so far, and how far the run is."""

    def __init__(
        self, given: Given, cases: Sequence[Case], journal: Journal, tell: Callable[[str], None], rows: dict[Plan, Row]
    ) -> None:
        self.given, self.cases, self.journal, self.tell, self.rows = given, cases, journal, tell, rows
        self.left, self.passed = 0, 0
        self.left_out: set[Plan] = set()
        self._began = time.perf_counter()
        self._follows: list[list[int]] | None = None

    @property
    def late(self) -> bool:
        """Whether the time is over after which nothing is begun."""
        minutes = self.given.minutes
        return minutes is not None and time.perf_counter() - self._began > 60 * minutes

    def continuations(self, dense: Ours) -> list[list[int]]:
        """Return dense's own greedy continuation of each text, made once."""
        if self._follows is None:
            self.tell("dense continues each text")
            self._follows = [dense.continued(c, self.given.greedy) for c in self.cases if c.question is None]
        return self._follows

    def leave_out(self, plan: Plan, error: UsageError) -> None:
        """Note a way that can't keep so little."""
        self.tell(f"left out: {plan[1]} at {plan[2]:g}: {error}")
        self.left_out.add(plan)
        self.passed += 1

    def found(self, found: _Found | BaseException | None) -> int:
        """Take what a process found; 1: it has ended."""
        if isinstance(found, BaseException):
            raise found
        if found is None:
            return 1
        if found.error is not None:
            self.leave_out(found.plan, found.error)
        else:
            self.take(found.plan, found.options, found.outcomes)
        return 0

    def take(self, plan: Plan, options: str, outcomes: Sequence[Outcome]) -> None:
        """Keep a row in the journal, and tell it."""
        who, way, ratio = plan
        assert self._follows is not None, "every row compares with dense's continuations"
        dense = self.rows.get((who, DENSE, 1.0))
        found = self.rows[plan] = row(who, way, ratio, options, self.cases, outcomes, self._follows, dense)
        self.journal.append({"of": self.given.about, "row": asdict(found)})
        self.passed += 1
        ends = duration((time.perf_counter() - self._began) / self.passed * (self.left - self.passed))
        self.tell(
            f"[{self.passed}/{self.left}] {who} {way} at {ratio:g}: score {found.score:.1%}, perplexity / dense "
            f"{found.perplexity_ratio:.3f}, agreement {found.agreement:.1%}, kept {found.kept_share:.1%}, "
            f"about {ends} left"
        )


def _alike(denses: Sequence[Row]) -> None:
    """Refuse to compare where the two sides' dense attention differs: it would not be the same model."""
    if len(denses) == 2:
        mine, other = denses
        if not abs(mine.perplexity / other.perplexity - 1) < 0.02:
            raise UsageError(
                f"dense perplexity is {mine.perplexity} here and {other.perplexity} at {other.who}: they did not load "
                "the same weights, or not in the same number type"
            )
