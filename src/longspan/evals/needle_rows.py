"""Rows of the needle eval: what makes two questions the same, what came out, and tables of it.

It does not know how questions are asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from longspan.errors import UsageError
from longspan.evals.journal import Entry, merged, read


@dataclass(frozen=True)
class Key:
    """What a question is, whenever and wherever it is asked."""

    fingerprint: str
    """Of the model."""
    dtype: str
    mechanism: str
    """The specification without options at their defaults; `auto` where the engine chose."""
    kind: str
    requested: int
    """Tokens wanted in the haystack."""
    haystack: int
    """Its seed."""
    question: int
    """Its index among the haystack's."""


_KEY = tuple(field.name for field in fields(Key))


@dataclass(frozen=True)
class Row(Key):
    """One question's outcome; by the fields of its key a later run knows it."""

    spec: str
    """The mechanism as the user wrote it."""
    length: int
    """Tokens in the haystack."""
    depth: float
    right: bool
    """The answer contains what it must, in the model's words or in what is quoted after them."""
    own_words: bool
    """It does without the quotation."""
    ranked_first: bool
    """The best citation's page holds (the first of) the facts needed."""
    cited: bool
    """Every fact needed stands in a citation."""
    chosen_by: str
    attention: str
    """The mechanism that read: tells what `auto` was."""
    first_token_s: float
    answer: str
    wanted: str

    @property
    def key(self) -> Key:
        """What was asked."""
        return Key(**{name: getattr(self, name) for name in _KEY})


_KINDS: dict[str, type] = get_type_hints(Row)


def answered(entries: Iterable[Entry]) -> dict[Key, Entry]:
    """Return the rows of journals by their questions; of several answers to one question the first counts.

    Raises:
        UsageError: rows of another eval, or of a version with other fields.
    """
    found: dict[Key, Entry] = {}
    for entry in entries:
        found.setdefault(_row(entry).key, entry)
    return found


def of_one_model(files: Sequence[Path]) -> list[Entry]:
    """Return the rows of several files, each question once."""
    found = answered(entry for file in files for entry in read(file))
    if not found:
        raise UsageError(f"no answers in {', '.join(map(str, files))}")
    models = {(key.fingerprint, key.dtype) for key in found}
    if len(models) > 1:
        raise UsageError("these files hold answers of several models or types: merge those of each by themselves")
    return list(found.values())


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return environment, table and rows as one object."""
    result = merged(entries)
    rows = result.pop("rows")
    return {**result, "table": table([_row(entry) for entry in entries]), "rows": rows}


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """Return one line a mechanism, kind and length: how many questions, and of how many each thing holds."""
    lines = []
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.mechanism, row.kind, round(row.length / 1024)), []).append(row)
    for (mechanism, kind, thousands), group in groups.items():
        count = len(group)
        lines.append(
            {
                "mechanism": mechanism,
                "kind": kind,
                "length": f"{thousands}K",
                "questions": count,
                "right": sum(row.right for row in group),
                "own_words": sum(row.own_words for row in group),
                "ranked_first": sum(row.ranked_first for row in group),
                "cited": sum(row.cited for row in group),
            }
        )
    return lines


def _row(entry: Entry) -> Row:
    foreign = UsageError("the file holds rows of another eval, or of another version of this one")
    try:
        row = Row(**entry.row)
    except TypeError as error:
        raise foreign from error
    for name, kind in _KINDS.items():
        # JSON writes a float without a fraction as an integer at times; a bool is an int to Python alone.
        allowed = (int, float) if kind is float else kind
        if not isinstance(value := getattr(row, name), allowed) or isinstance(value, bool) != (kind is bool):
            raise foreign
    return row
