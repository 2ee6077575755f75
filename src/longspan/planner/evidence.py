"""What committed evals found of mechanisms and KV formats: shares of right answers, with intervals.

Entries come from `measured.json`. Of several lengths the one that is nearest to the context counts, however far it
is. It does not know whether a finding on a small model, or at a shorter context, carries: it says which it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longspan.lengths import short
from longspan.planner import measured


@dataclass(frozen=True)
class Found:
    """What an eval found."""

    score: float
    low: float
    high: float
    told: str


def of(attention: str, narrow: str | None, context: int) -> Found | None:
    """Return what is known of a mechanism near a context; None: nothing.

    Args:
        attention: specification of the mechanism, as evals name it.
        narrow: the KV format where it is not the model's own; of dense attention, its loss against exact keys counts.
        context: tokens.
    """
    if narrow is not None and attention == "dense":
        return _format(narrow.partition(":")[0])
    chosen = [each for each in _entries() if each["mechanism"] == attention]
    if not chosen:
        return None
    nearest = min(chosen, key=lambda each: abs(math.log(each["length"] / context)))
    what = "needles found" if nearest["eval"] == "needle" else "of RULER right"
    told = (
        f"{100 * nearest['score']:.0f} % {what} at {short(nearest['length'])} ({nearest['model']}, {_where(nearest)})"
    )
    return Found(nearest["score"], nearest["low"], nearest["high"], told)


def _format(kv: str) -> Found | None:
    """Return the score with a KV format over the score without, on the same questions."""
    rows = {each["way"]: each for each in measured.entries()["evals"] if each["eval"] == "compress"}
    if kv not in rows or "dense" not in rows or not rows["dense"]["score"]:
        return None
    share = min(1.0, rows[kv]["score"] / rows["dense"]["score"])
    told = (
        f"{100 * share:.0f} % of dense's score at {short(rows[kv]['length'])} ({rows[kv]['model']}, {_where(rows[kv])})"
    )
    return Found(share, max(0.0, share - 0.1), min(1.0, share + 0.1), told)


@functools.cache
def _entries() -> Sequence[dict[str, Any]]:
    return [each for each in measured.entries()["evals"] if each["eval"] in ("needle", "ruler")]


def _where(entry: dict[str, Any]) -> str:
    return f"{entry['file']} row {entry['row']}"
