"""Tables of rows: scores with 95 % intervals by contender, task and length.

It does not know who was asked; pictures and pages are made from the same rows elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from longspan.evals.asking.rows import Row, contender, row_of
from longspan.evals.journal import Entry, merged
from longspan.evals.questions.registry import evaluation
from longspan.evals.statistics import Interval, averaged, interval, shared

AVERAGE = "average"
"""Stands for all tasks in a table."""


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return environment, table and rows as one object; `runs` holds every run's own environment."""
    result = merged(entries)
    rows = [entry.row for entry in entries]
    result.pop("rows")
    return {**result, "table": table([row_of(entry) for entry in entries]), "rows": rows}


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line a contender, task and length, and one a contender and length for all tasks.

    A line has `contender`, `task`, `length`, `questions`, `score`, `low` and `high` (its 95 % interval) in percent,
    `chance`, `errors` (questions without an answer), and a task's also `kept_bytes`, the mean of what was kept of a
    context. Where probabilities are measured there are `perplexity`, `low` and `high` in their stead.
    """
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((contender(row), row.length, row.task), []).append(row)
    lines: list[dict[str, Any]] = []
    parts: dict[tuple[str, int], list[tuple[Interval, list[Row]]]] = {}
    for (who, length, task), group in groups.items():
        kept = {"kept_bytes": round(sum(row.kept_bytes for row in group) / len(group))}
        if group[0].scoring == "probability":
            lines.append(_line(who, task, length, group, _perplexity(group)) | kept)
            continue
        mean = interval([row.score for row in group])
        lines.append(_line(who, task, length, group, _percent(mean, group)) | kept)
        parts.setdefault((who, length), []).append((mean, group))
    for (who, length), each in parts.items():
        if len(each) > 1:
            every = [row for _, group in each for row in group]
            mean = _average([part for part, _ in each], [group for _, group in each])
            chance = sum(sum(row.chance for row in group) / len(group) for _, group in each) / len(each)
            lines.append(_line(who, AVERAGE, length, every, _percent(mean, every) | {"chance": round(100 * chance, 1)}))
    return lines


def of_all_tasks(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the lines of those who were asked every task at a length: an average of some is none beside one of all."""
    asked = Counter((line["contender"], line["length"]) for line in lines if line["task"] != AVERAGE)
    most = max(asked.values(), default=0)
    return [line for line in lines if asked[line["contender"], line["length"]] == most]


def cells(lines: Sequence[dict[str, Any]]) -> tuple[list[int], list[list[str]]]:
    """Return the lengths of a table and, a line a contender and task, their names, then the score at each length."""
    lengths = sorted({line["length"] for line in lines})
    known = {(line["contender"], line["task"], line["length"]): line for line in lines}
    named = dict.fromkeys((line["contender"], line["task"]) for line in lines if line["task"] != AVERAGE)
    named |= dict.fromkeys((line["contender"], line["task"]) for line in lines if line["task"] == AVERAGE)
    return lengths, [[*who, *(_cell(known.get((*who, length))) for length in lengths)] for who in named]


def _average(parts: Sequence[Interval], groups: Sequence[Sequence[Row]]) -> Interval:
    """Return the mean of tasks, each counted once, whichever has more questions, and its interval."""
    together = None
    if evaluation(groups[0][0].eval).paired:
        together = shared([{(row.seed, row.question): row.score for row in group} for group in groups])
    return together or averaged(parts)


def _line(who: str, task: str, length: int, group: Sequence[Row], found: dict[str, float]) -> dict[str, Any]:
    errors = sum(bool(row.error) for row in group)
    return {"contender": who, "task": task, "length": length, "questions": len(group), **found, "errors": errors}


def _percent(found: Interval, group: Sequence[Row]) -> dict[str, float]:
    chance = sum(row.chance for row in group) / len(group)
    percent = {"score": found.mean, "low": found.low, "high": found.high, "chance": chance}
    return {name: round(100 * value, 1) for name, value in percent.items()}


def _perplexity(group: Sequence[Row]) -> dict[str, float]:
    """Return the perplexity of texts together, with its interval."""
    nlls = [row.measures["nll"] for row in group if not row.error]
    if not nlls:
        return {}
    found = interval(nlls, None, None)
    ends = {"perplexity": found.mean, "low": found.low, "high": found.high}
    return {name: round(math.exp(value), 3) for name, value in ends.items()}


def _cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return ""
    if "perplexity" in line:
        return f"{line['perplexity']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
    return f"{line['score']:.1f} ({line['low']:.0f} to {line['high']:.0f})" if "score" in line else ""
