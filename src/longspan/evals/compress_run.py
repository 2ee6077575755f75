"""Runs a comparison of ways to compress: what a journal does not hold yet, way by way, and tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longspan.attention import make
from longspan.errors import UsageError
from longspan.evals.compress import DENSE, Case, Ours, Outcome, Row, Runner, Theirs, measure, row, within
from longspan.evals.journal import Journal
from longspan.evals.progress import duration
from longspan.hf.model import CausalModel
from longspan.peers.process import Peer

OURS = "longspan"

WAYS = (
    "streaming", "h2o", "snapkv", "snapkv:heads=adaptive", "rocketkv", "expected", "expected:heads=adaptive", "keydiff",
    "fp8", "int8", "int4", "int2", "snapkv:heads=adaptive+int8", "snapkv:heads=adaptive+int4",
    "expected:heads=adaptive+int4",
)  # fmt: skip
"""Ours, where none are named: each method alone, each format alone, and both together."""

PRESSES = {
    "kvpress": (
        "streaming_llm", "observed_attention", "snapkv", "ada_snapkv", "pyramidkv", "tova", "expected_attention",
        "ada_expected_attention", "keydiff", "knorm", "lagkv", "kvzip",
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


def run(
    model: CausalModel,
    peer: Peer | None,
    given: Given,
    cases: Sequence[Case],
    journal: Journal,
    tell: Callable[[str], None],
) -> list[Row]:
    """Return a row a way and ratio, dense first; those of the journal are not measured again.

    A way that can't keep so little is left out and named.
    """
    known = {
        (r["who"], r["way"], r["ratio"]): Row(**r)
        for r in (entry.row["row"] for entry in journal.entries if entry.row["of"] == given.about)
    }

    def made(who: str, way: str, ratio: float) -> tuple[Runner, str]:
        if who != OURS:
            assert peer is not None, "presses are planned for a peer alone"
            dense = way == DENSE
            return Theirs(peer, model, "" if dense else way, ratio), f"{way} compression_ratio={1 - 1 / ratio:g}"
        mechanism, kv_format = within(model, way, ratio, given.length)
        return Ours(model, mechanism, kv_format), mechanism.describe() + (f" +{kv_format}" if kv_format else "")

    sides = [(OURS, given.ways)] + ([(peer.name, given.presses)] if peer is not None else [])
    plans = [(who, DENSE, 1.0) for who, _ in sides]
    plans += [(who, way, ratio) for ratio in given.ratios for who, ways in sides for way in ways]
    left = [plan for plan in plans if plan not in known]
    dense = Ours(model, make(DENSE), None)
    continuations = _Continuations(dense, cases, given.greedy)
    began, passed, rows = time.perf_counter(), 0, []
    denses: dict[str, Row] = {}
    for who, way, ratio in plans:
        found = known.get((who, way, ratio))
        if found is None:
            try:
                runner, options = made(who, way, ratio)
            except UsageError as error:
                tell(f"left out: {way} at {ratio:g}: {error}")
                passed += 1
                continue
            follows = continuations.get(tell)
            outcomes: list[Outcome] = list(measure(runner, cases, follows, lambda: None))
            found = row(who, way, ratio, options, cases, outcomes, follows, denses.get(who))
            journal.append({"of": given.about, "row": asdict(found)})
            passed += 1
            ends = duration((time.perf_counter() - began) / passed * (len(left) - passed))
            tell(
                f"[{passed}/{len(left)}] {who} {way} at {ratio:g}: score {found.score:.1%}, perplexity / dense "
                f"{found.perplexity_ratio:.3f}, agreement {found.agreement:.1%}, kept {found.kept_share:.1%}, "
                f"about {ends} left"
            )
        if way == DENSE:
            denses[who] = found
            _alike(denses)
        rows.append(found)
    return rows


class _Continuations:
    """Dense's own greedy continuation of each text, made once, where something is left to measure."""

    def __init__(self, dense: Ours, cases: Sequence[Case], count: int) -> None:
        self._dense, self._cases, self._count = dense, cases, count
        self._found: list[list[int]] | None = None

    def get(self, tell: Callable[[str], None]) -> list[list[int]]:
        if self._found is None:
            tell("dense continues each text")
            self._found = [self._dense.continued(c, self._count) for c in self._cases if c.question is None]
        return self._found


def _alike(denses: dict[str, Row]) -> None:
    """Refuse to compare where the two sides' dense attention differs: it would not be the same model."""
    if len(denses) == 2:
        mine, other = denses.values()
        if not abs(mine.perplexity / other.perplexity - 1) < 0.02:
            raise UsageError(
                f"dense perplexity is {mine.perplexity} here and {other.perplexity} at {other.who}: they did not load "
                "the same weights, or not in the same number type"
            )
