"""Evals that measure whole runs and not single questions: their own tables and pictures, taken into a report.

These are `longspan eval compare` and `longspan eval compress`. It does not know what their figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.evals import compare_report, compress_report
from longspan.evals.journal import Entry


@dataclass(frozen=True)
class Aside:
    """Rows of one eval that were measured on the same tasks."""

    eval: str
    about: str
    """What they were measured on, and where."""
    name: str
    """Of its picture's file, without the ending."""
    columns: Sequence[str]
    """Titles of the table; one that begins with > stands over numbers."""
    lines: Sequence[Sequence[str]]
    rows: Sequence[dict[str, Any]]
    picture: Callable[[Sequence[dict[str, Any]], str, Path], None]

    def draw(self, folder: Path) -> Path:
        """Write the eval's own picture into a folder and return its file (UsageError, SaveError: as there)."""
        file = folder / f"{self.name}.png"
        self.picture(self.rows, self.about, file)
        return file


def asides(entries: Sequence[Entry]) -> tuple[list[Aside], list[Entry]]:
    """Return what is known of rows that are no single question's, and the rows that nobody knows."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    unknown = []
    for entry in entries:
        row = entry.row.get("row", entry.row)
        eval_name = _eval_of(row)
        if eval_name is None:
            unknown.append(entry)
            continue
        # Figures of different lengths, texts or models stand in tables of their own.
        same = entry.row.get("task", entry.row.get("of", {}))
        apart = json.dumps([same, row["length"] if eval_name == "compare" else 0, entry.environment.get("model")])
        groups.setdefault((eval_name, apart), []).append(entry)
    found, seen = [], dict[str, int]()
    for (eval_name, _), group in groups.items():
        made = _aside(eval_name, group)
        number = seen[made.name] = seen.get(made.name, 0) + 1
        found.append(made if number == 1 else _renamed(made, f"{made.name}-{number}"))
    return found, unknown


def _eval_of(row: object) -> str | None:
    if not isinstance(row, dict):
        return None
    if {"mechanism", "budget", "keys", "perplexity_ratio", "agreement", "needles"} <= row.keys():
        return "compare"
    return "compress" if {"who", "way", "ratio", "kept_share", "perplexity_ratio"} <= row.keys() else None


def _aside(eval_name: str, group: Sequence[Entry]) -> Aside:
    about = group[0].environment
    where = ", ".join(str(about[key]) for key in ("dtype", "device") if key in about)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in group:
        row = entry.row.get("row", entry.row)
        if eval_name == "compare":
            rows.setdefault((row["mechanism"], row["budget"]), row)
        else:
            rows.setdefault((row["who"], row["way"], row["ratio"]), row)
    every = list(rows.values())
    said = f"{Path(str(about.get('model', 'a model'))).name}, {where}"
    if eval_name == "compare":
        name = f"compare-{every[0]['length']}"
        lines = compare_report.table(every)
        return Aside(eval_name, said, name, compare_report.COLUMNS, lines, every, compare_report.picture)
    length = group[0].row.get("of", {}).get("length")
    said += f", {length:,} tokens" if length else ""
    lines = compress_report.table(every)
    return Aside(eval_name, said, "compress", compress_report.COLUMNS, lines, every, compress_report.picture)


def _renamed(aside: Aside, name: str) -> Aside:
    return Aside(aside.eval, aside.about, name, aside.columns, aside.lines, aside.rows, aside.picture)
