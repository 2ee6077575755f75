"""Finds journals: files and folders that a user names become entries, each row once a file.

It reads JSONL journals (`evals/journal.py`) and the JSON object that an eval prints (`--json`), with its rows and runs,
whatever the file's name. It does not know what a row holds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longspan.errors import UsageError
from longspan.evals.journal import Entry, read


def entries(runs: Sequence[Path], tell: Callable[[str], None] = lambda _: None) -> list[Entry]:
    """Return the rows of all runs, in the order of their names.

    Args:
        runs: journals, printed results, or folders with journals (`*.jsonl`) at any depth.
        tell: told what was left out of a folder, in a line.

    Raises:
        UsageError: a run that is not there, is no journal, or holds none; no row at all.
    """
    found: list[Entry] = []
    for run in runs:
        if run.is_dir():
            found += _in_folder(run, tell)
        else:
            found += _in_file(run)
    if not found:
        raise UsageError(f"no answers in {', '.join(map(str, runs))}: name the folder that an eval's --out named")
    return found


def _in_folder(folder: Path, tell: Callable[[str], None]) -> list[Entry]:
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise UsageError(f"the folder {folder} holds no journal (*.jsonl): name the folder that an eval's --out named")
    found: list[Entry] = []
    for file in files:
        try:
            found += read(file)
        except UsageError as error:
            # A folder may hold JSONL of others; a file that was named may not be another's.
            tell(f"left out: {error}")
    return found


def _in_file(file: Path) -> list[Entry]:
    """Return the rows of a file in either form; its ending says which it is likelier to be."""
    first, second = (_printed, read) if file.suffix == ".json" else (read, _printed)
    try:
        return first(file)
    except UsageError:
        with contextlib.suppress(UsageError):
            if found := second(file):
                return found
        raise


def _printed(file: Path) -> list[Entry]:
    """Return the rows of an object that an eval printed; a row tells which of its runs it is of."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read {file}: {error.strerror or error}") from error
    except ValueError:
        found = None  # also of bytes that are no UTF-8
    try:
        about = {key: value for key, value in found.items() if isinstance(value, str | int | float)}
        return [Entry(row, _run_of(row, found.get("runs", [])) or about) for row in found["rows"]]
    except (TypeError, KeyError, IndexError, AttributeError):
        raise UsageError(f"{file} is no result of an eval: give what its --json printed, or its journal") from None


def _run_of(row: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the environment of a row's run, which it names or counts; None: it does neither."""
    named = row.get("run")
    return runs[named] if isinstance(named, int) else next((run for run in runs if run.get("run") == named), None)
