"""Rows of RULER: what makes two questions the same, what came out, and tables of it.

It does not know how questions are made or asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from longspan.errors import UsageError
from longspan.evals.journal import Entry, merged
from longspan.evals.ruler.scoring import Interval, averaged, wilson

AVERAGE = "average"
"""Stands for all tasks in a table."""


class Key(NamedTuple):
    """What a question is, and who is asked, whenever that is."""

    questions: str
    """A hash of what questions are made of: version, sources, tokenizer, template."""
    fingerprint: str
    """Of the model."""
    dtype: str
    attention: str
    """The specification without options at their defaults; `auto`: the engine chooses."""
    prefill: str
    """The same for how documents are read; empty: as the attention does."""
    kv: str
    kv_budget: int
    """Bytes; 0: no limit."""
    task: str
    length: int
    seed: int
    question: int
    """Its number among those of its task, length and seed."""


@dataclass(frozen=True)
class Row:
    """One question's outcome; with the fields of its `Key`, by which a later run knows it."""

    questions: str
    fingerprint: str
    dtype: str
    attention: str
    prefill: str
    kv: str
    kv_budget: int
    task: str
    length: int
    seed: int
    question: int
    """Its number among those of its task, length and seed."""
    tokens: int
    """Of prompt and answer; `length` was asked for."""
    depths: list[float]
    """See `Example.depths`."""
    score: float
    """From 0 to 1."""
    read_by: str
    """The mechanism that read: tells what `auto` was."""
    read_tokens_per_s: float
    kept_bytes: int
    """Of what was kept of the context when the question came."""
    first_token_s: float
    decode_tokens_per_s: float
    answer: str
    wanted: list[str]

    @property
    def key(self) -> Key:
        """What was asked, and of whom."""
        return Key(*(getattr(self, name) for name in Key._fields))


_WRITTEN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
_KINDS = {field.name: _WRITTEN.get(str(field.type), (list,)) for field in fields(Row)}


def answered(entries: Iterable[Entry]) -> dict[Key, Entry]:
    """Return the rows of a journal by their questions; of several answers to one question the first counts.

    Raises:
        UsageError: rows of another eval, or of a version with other fields.
    """
    found: dict[Key, Entry] = {}
    for entry in entries:
        found.setdefault(row_of(entry).key, entry)
    return found


def row_of(entry: Entry) -> Row:
    """Return a journal's row (UsageError: it is of another eval)."""
    try:
        row = Row(**entry.row)
    except TypeError:
        row = None  # other fields
    if row is None or not all(isinstance(getattr(row, name), kind) for name, kind in _KINDS.items()):
        raise UsageError("the file holds rows of another eval, or of another version of this one: name another folder")
    return row


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return environment, table and rows as one object."""
    result = merged(entries)
    rows = result.pop("rows")
    return {**result, "table": table([row_of(entry) for entry in entries]), "rows": rows}


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return a line a task and length, and one a length for all tasks: score and 95 % interval in percent.

    A task's line also has the mean of the bytes kept of a context.
    """
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.length, row.task), []).append(row)
    lines, parts = [], dict[int, list[tuple[Interval, int]]]()
    for (length, task), group in groups.items():
        interval = wilson([row.score for row in group])
        kept = round(sum(row.kept_bytes for row in group) / len(group))
        lines.append({**_line(task, length, len(group), interval), "kept_bytes": kept})
        parts.setdefault(length, []).append((interval, len(group)))
    for length, each in parts.items():
        if len(each) > 1:
            count = sum(questions for _, questions in each)
            lines.append(_line(AVERAGE, length, count, averaged([interval for interval, _ in each])))
    return lines


def cells(lines: Sequence[dict[str, Any]]) -> tuple[list[int], list[list[str]]]:
    """Return the lengths of a table and, a line a task, its name, then score and interval at each length."""
    lengths = list(dict.fromkeys(line["length"] for line in lines))
    known = {(line["task"], line["length"]): line for line in lines}
    tasks = list(dict.fromkeys(line["task"] for line in lines if line["task"] != AVERAGE))
    if any(line["task"] == AVERAGE for line in lines):
        tasks.append(AVERAGE)
    return lengths, [[task, *(_cell(known.get((task, length))) for length in lengths)] for task in tasks]


def _line(task: str, length: int, questions: int, interval: Interval) -> dict[str, Any]:
    percent = {"score": interval.mean, "low": interval.low, "high": interval.high}
    shown = {name: round(100 * value, 1) for name, value in percent.items()}
    return {"task": task, "length": length, "questions": questions, **shown}


def _cell(line: dict[str, Any] | None) -> str:
    return "" if line is None else f"{line['score']:.1f} ({line['low']:.0f} to {line['high']:.0f})"
