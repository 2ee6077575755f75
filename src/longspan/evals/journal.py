"""Rows of an eval in a file, one JSON object a line, appended as they come: an interrupted run loses nothing.

Each start of a run writes a line `{"environment": {...}}`; the rows after it were measured there. A line that a kill
cut short is the file's last: reading leaves it out, and the next run cuts it off. It does not know what a row holds.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from longspan.errors import SaveError, UsageError
from longspan.sessions.locks import locked

_FIRST = b'{"environment"'


@dataclass(frozen=True)
class Entry:
    """A row and where it was measured."""

    row: dict[str, Any]
    environment: dict[str, Any]


class Journal:
    """A file of rows that grows; only one run at a time writes to it."""

    def __init__(self, file: Path | None) -> None:
        """Open a file, or make it, and read what it holds.

        Args:
            file: None: rows are kept in memory alone.

        Raises:
            UsageError: it can't be written, is no journal, or another run writes to it.
        """
        self.file = file
        self.entries: list[Entry] = []
        self._environment: dict[str, Any] | None = None
        self._stream: BinaryIO | None = None
        self._held = contextlib.ExitStack()
        if file is None:
            return
        lock = Path(f"{file}.lock")
        with contextlib.ExitStack() as stack:
            try:
                # The lock guards nothing that outlives the run: its file goes with it.
                stack.enter_context(locked(lock, lock.with_suffix(".none"), wait=False))
                stream = stack.enter_context(file.open("a+b"))
                stream.seek(0)
                data = stream.read()
                self.entries, whole = _parsed(data, file)
                stream.truncate(whole)
                if whole and data[whole - 1 : whole] != b"\n":
                    stream.write(b"\n")
            except BlockingIOError:
                raise UsageError(f"another run writes to {file}: wait for its end, or name another file") from None
            except OSError as error:
                raise UsageError(f"can't write {file}: {error.strerror or error}") from error
            self._stream, self._held = stream, stack.pop_all()

    def begin(self, environment: dict[str, Any]) -> None:
        """Write where the rows that follow are measured (SaveError: it can't be written)."""
        self._environment = environment
        self._write({"environment": environment})

    def append(self, row: dict[str, Any]) -> None:
        """Add a row and write it through to the disk (SaveError: it can't be written)."""
        assert self._environment is not None, "begin comes first"
        assert set(row) != {"environment"}, "a row must not look like an environment"
        self._write(row)
        self.entries.append(Entry(row, self._environment))

    def close(self) -> None:
        """Close the file and let others write to it."""
        self._held.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            return
        # What is no Unicode (an argument's stray byte) becomes an escape that JSON reads.
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            self._stream.write(data)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise SaveError(f"can't write {self.file}: {error.strerror or error}") from error


def in_folder(folder: str | None, name: str) -> Journal:
    """Open the journal of that name in a folder, which is made if need be; None: rows are kept in memory alone.

    Raises:
        SaveError: the folder can't be made.
        UsageError: see `Journal`.
    """
    if folder is None:
        return Journal(None)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"can't make {folder}: {error.strerror or error}") from error
    return Journal(Path(folder) / name)


def read(file: Path) -> list[Entry]:
    """Return the rows of a file (UsageError: it can't be read, or is no journal)."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"can't read {file}: {error.strerror or error}") from error
    return _parsed(data, file)[0]


def merged(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return one result of many rows: their environment, every run's own as `runs`, and the rows with their `run`.

    A field of the environment that differs between runs holds each value once, with semicolons between.
    """
    runs: list[dict[str, Any]] = []
    for entry in entries:
        if entry.environment not in runs:
            runs.append(entry.environment)
    about: dict[str, Any] = {}
    for key in dict.fromkeys(key for run in runs for key in run):
        values = [run[key] for run in runs if key in run]
        alike = all(value == values[0] for value in values)
        about[key] = values[0] if alike else "; ".join(dict.fromkeys(map(str, values)))
    rows = [{**entry.row, "run": runs.index(entry.environment)} for entry in entries]
    return {**about, "runs": runs, "rows": rows}


def _parsed(data: bytes, file: Path) -> tuple[list[Entry], int]:
    """Return the rows in a file's bytes, and how many of these are whole lines."""
    entries: list[Entry] = []
    environment: dict[str, Any] | None = None
    whole = 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        found = _object(line)
        told = None if found is None or set(found) != {"environment"} else found["environment"]
        begun = found is None and (_FIRST.startswith(line) or line.startswith(_FIRST))
        if environment is None and told is None and not begun:
            # Nothing is cut off a file that is not ours.
            raise UsageError(f"{file} is no journal of an eval: its first line names no environment")
        if found is None:
            if number < len(lines):
                raise UsageError(f"{file}, line {number} is no JSON object: mend or remove that line")
            break
        if told is not None:
            environment = told
        elif environment is not None:
            entries.append(Entry(found, environment))
        whole += len(line)
    return entries, whole


def _object(line: bytes) -> dict[str, Any] | None:
    """Return a line's JSON object; None where it holds none, or only the beginning of one."""
    try:
        found = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        return None
    return found if isinstance(found, dict) else None
