"""The catalogue of a folder of sessions, in SQLite: what a listing shows, when each was used, whose tokens begin how.

All of it but use and hits stands in the journals, and is put together again from them where the catalogue is lost or
damaged: no session depends on it. What the disk refuses here is therefore no error. Each row carries a checksum of its
own, since SQLite has none. Processes share it by SQLite's write-ahead log.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longspan.sessions import files, records, seal

FILE = ".catalogue.sqlite"
VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions(
    name TEXT PRIMARY KEY, file TEXT, end INTEGER, folder INTEGER, number INTEGER, created TEXT, saved TEXT, used REAL,
    bytes INTEGER, kept INTEGER, ttl REAL, identity TEXT, state TEXT, hits INTEGER, hit_tokens INTEGER, seal TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prefixes(hash BLOB, name TEXT, pages INTEGER, PRIMARY KEY(hash, name)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS prefixes_by_name ON prefixes(name);
"""
_REFUSED = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
}  # fmt: skip
"""What SQLite says where another process or a full disk stands against it: nothing of damage."""
_AT_ONCE = 500  # of SQLite's least limit of 999 values in a statement


@dataclass(frozen=True)
class Row:
    """What is known of a session, and by which marks of its files that is told to be so still."""

    name: str
    file: str
    end: int
    folder: int
    number: int
    created: str
    saved: str
    used: float
    bytes: int
    kept: bool
    ttl: float | None
    identity: dict[str, Any]
    state: dict[str, Any]
    hits: int = 0
    hit_tokens: int = 0

    def values(self) -> list[Any]:
        """Return it as SQLite holds it, with its checksum."""
        held = [getattr(self, each.name) for each in fields(self)]
        held = [json.dumps(each, sort_keys=True) if isinstance(each, dict) else each for each in held]
        held = [int(each) if isinstance(each, bool) else each for each in held]
        return [*held, f"{records.checksum(json.dumps(held).encode()):016x}"]

    @classmethod
    def of(cls, held: Sequence[Any]) -> Row | None:
        """Return what SQLite held; None: it fails its checksum."""
        *values, seal = held
        if any(isinstance(value, bytes) for value in values):  # a text may become one by a bit, and is no JSON then
            return None
        if f"{records.checksum(json.dumps(values).encode()):016x}" != seal:
            return None
        told = dict(zip((each.name for each in fields(cls)), values, strict=True))
        told |= {
            "kept": bool(told["kept"]),
            "identity": json.loads(told["identity"]),
            "state": json.loads(told["state"]),
        }
        return cls(**told)


class Catalogue:
    """The catalogue beside the sessions in a folder; made where the folder is there."""

    def __init__(self, root: Path) -> None:
        """Take the folder of all sessions."""
        self.path = root / FILE
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = 0
        self._end: Callable[[], object] | None = None
        """Seals and closes the file, at the latest when the program ends."""

    def row(self, name: str) -> Row | None:
        """Return what is known of a session; None: nothing, or it is damaged."""
        with self._open() as base:
            if base is not None:
                found = base.execute("SELECT * FROM sessions WHERE name = ?", [name]).fetchone()
                return None if found is None else Row.of(found)
        return None

    def rows(self) -> dict[str, Row]:
        """Return what is known of all sessions, by name; damaged rows are left out."""
        with self._open() as base:
            if base is not None:
                found = [Row.of(each) for each in base.execute("SELECT * FROM sessions")]
                return {row.name: row for row in found if row is not None}
        return {}

    def put(self, row: Row, prefixes: Sequence[bytes] | None = None) -> None:
        """Enter a session in the place of what was known of it; use and hits stay where they are newer.

        Args:
            row: what is known.
            prefixes: the hash chain of its tokens; None: as it was.
        """
        with self._open() as base:
            if base is None:
                return
            before = self.row(row.name)
            if before is not None and before.file == row.file and before.number > row.number:
                return  # a reader has come late
            if before is not None:
                hits = {"hits": before.hits, "hit_tokens": before.hit_tokens, "used": max(before.used, row.used)}
                row = Row(**{**{each.name: getattr(row, each.name) for each in fields(row)}, **hits})
            self._write(base, row)
            if prefixes is not None:
                base.execute("DELETE FROM prefixes WHERE name = ?", [row.name])
                base.executemany(
                    "INSERT OR REPLACE INTO prefixes VALUES(?, ?, ?)",
                    [(each, row.name, i + 1) for i, each in enumerate(prefixes)],
                )

    def drop(self, name: str) -> None:
        """Forget a session."""
        with self._open() as base:
            if base is not None:
                base.execute("DELETE FROM sessions WHERE name = ?", [name])
                base.execute("DELETE FROM prefixes WHERE name = ?", [name])

    def touch(self, name: str, used: float, hit_tokens: int | None = None) -> None:
        """Note when a session was used, and how many tokens a request found in it that did not ask for it."""
        with self._open() as base:
            row = None if base is None else self.row(name)
            if base is not None and row is not None:
                told = {each.name: getattr(row, each.name) for each in fields(row)} | {"used": used}
                if hit_tokens is not None:
                    told |= {"hits": row.hits + 1, "hit_tokens": row.hit_tokens + hit_tokens}
                self._write(base, Row(**told))

    def longest(self, chain: Sequence[bytes]) -> list[tuple[str, int]]:
        """Return the sessions that begin with most of a hash chain, and how many pages that is, the longest first."""
        with self._open() as base:
            found: dict[str, int] = {}
            for start in range(0, len(chain) if base is not None else 0, _AT_ONCE):
                part = chain[start : start + _AT_ONCE]
                assert base is not None, "looked at above"
                marks = ",".join("?" * len(part))
                rows = base.execute(
                    f"SELECT name, MAX(pages) FROM prefixes WHERE hash IN ({marks}) GROUP BY name", part
                )
                more = {str(name): pages for name, pages in rows if isinstance(pages, int)}  # a bit may make it none
                found |= more
                if not more:  # a chain that ends is not taken up again
                    break
            return sorted(found.items(), key=lambda each: (-each[1], each[0]))
        return []

    def prefixes(self, name: str) -> list[bytes]:
        """Return a session's hash chain as it is entered; none of it where its pages do not follow one another."""
        with self._open() as base:
            if base is not None:
                found = base.execute(
                    "SELECT hash, pages FROM prefixes WHERE name = ? ORDER BY pages", [name]
                ).fetchall()
                if [pages for _, pages in found] == list(range(1, len(found) + 1)):
                    return [bytes(each) for each, _ in found]
        return []

    def names(self) -> set[str]:
        """Return every name that anything is entered under."""
        with self._open() as base:
            if base is not None:
                found = base.execute("SELECT name FROM sessions UNION SELECT name FROM prefixes")
                return {str(name) for (name,) in found}
        return set()

    def problems(self) -> list[str]:
        """Return what is wrong with the file itself, a line each; nothing is healed (OSError: it can't be read now)."""
        if not self.path.exists():
            return []
        try:
            with self._lock:
                base = self._connect()
                sealed = seal.problem(base, self.path)
                if sealed is not None:
                    raise sqlite3.DatabaseError(sealed)
                told = [str(line) for (line,) in base.execute("PRAGMA integrity_check") if line != "ok"]
                for held in base.execute("SELECT * FROM sessions"):
                    if Row.of(held) is None:
                        told.append(f"the row of {held[0]!r} fails its checksum")
        except (sqlite3.Error, ValueError, TypeError, OverflowError, OSError) as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _REFUSED:
                raise OSError(f"the catalogue {self.path} can't be read now: {error}") from error
            told = [str(error)]
        return [f"the catalogue {self.path} is damaged: {line}; `longspan session gc` makes it anew" for line in told]

    def remove(self) -> None:
        """Remove the catalogue: it is made anew, use and hits being lost."""
        with self._lock:
            self.close()
            ends = ("", "-wal", "-shm", "-journal", seal.SUFFIX)
            files.discard([self.path.with_name(self.path.name + end) for end in ends])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection = None
            if self._end is not None:
                self._end()

    def _write(self, base: sqlite3.Connection, row: Row) -> None:
        values = row.values()
        base.execute(f"INSERT OR REPLACE INTO sessions VALUES({','.join('?' * len(values))})", values)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection | None]:
        """Give the open file for one transaction; None: there is none to be had. What fails inside is left undone."""
        with self._lock:
            try:
                base = self._connect() if self.path.parent.is_dir() else None
            except sqlite3.Error as error:
                base = self._again(error)
            nested, changes = base is not None and base.in_transaction, 0
            try:
                if base is not None and not nested:
                    base.execute("BEGIN")
                    changes = base.total_changes
                yield base
                if base is not None and not nested:
                    if base.total_changes > changes:
                        seal.count_up(base)
                    base.execute("COMMIT")
            except sqlite3.Error as error:
                if nested:
                    raise
                with suppress(sqlite3.Error):
                    if base is not None and base.in_transaction:
                        base.execute("ROLLBACK")
                self._again(error)
            except BaseException:
                with suppress(sqlite3.Error):
                    if base is not None and base.in_transaction and not nested:
                        base.execute("ROLLBACK")
                raise

    def _again(self, error: sqlite3.Error) -> sqlite3.Connection | None:
        """Make a damaged catalogue anew; None where the disk or another process stands against it."""
        self.close()
        if (
            isinstance(error, sqlite3.OperationalError)
            and "malformed" not in str(error)
            and "no such" not in str(error)
        ):
            return None
        self.remove()
        try:
            return self._connect()
        except sqlite3.Error:
            return None

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None and self._process == os.getpid():
            return self._connection
        self._connection = None  # a child's copy of its parent's must not be used, nor closed
        if not self.path.exists():
            with suppress(OSError):
                os.close(files.create(self.path))
        base = sqlite3.connect(self.path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise sqlite3.OperationalError("written by a later version")  # which goes on with it
            base.execute("PRAGMA synchronous = NORMAL")  # what is lost with the power is in the journals
            if version < VERSION:
                base.execute("PRAGMA journal_mode = WAL")
                base.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT")
        except BaseException:
            base.close()
            raise
        self._connection, self._process = base, os.getpid()
        self._end = weakref.finalize(self, _end, base, self.path, self._process)
        return base


def _end(base: sqlite3.Connection, path: Path, process: int) -> None:
    """Close a file, sealed where this process has changed it; a child's copy of its parent's is left alone."""
    if process != os.getpid():
        return
    with suppress(sqlite3.Error, OSError):
        if base.total_changes:
            seal.make(base, path)
    with suppress(sqlite3.Error):
        base.close()
