"""A checksum of every byte of the catalogue's file, in a file beside it: SQLite itself looks at what it uses alone.

SQLite counts in a file's header how often that was written, twice, and each of our transactions writes it. A seal names
the count that it was made at: while the file still has it, and nothing waits in its log, nothing but damage can have
changed a byte; once it has another, the seal says nothing. So a process that is killed between a change and its seal
raises no false alarm.
It knows no tables.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from longspan.sessions import files, records

SUFFIX = ".seal"
_PIECE = 1 << 20


def count_up(base: sqlite3.Connection) -> None:
    """Have a transaction, which is open, write the header."""
    (number,) = base.execute("PRAGMA application_id").fetchone()
    base.execute(f"PRAGMA application_id = {(int(number) + 1) % 2**31}")


def problem(base: sqlite3.Connection, path: Path) -> str | None:
    """Return what is wrong with a catalogue's bytes in a few words; None: nothing, as far as its seal says.

    Raises sqlite3.Error, OSError.
    """
    with _nobody_writes(base):
        try:
            told = path.with_name(path.name + SUFFIX).read_bytes()
        except FileNotFoundError:
            return None
        number, _, checksum = told[:-18].partition(b" ")
        if told != _told(number, checksum) or not number.isdigit():
            return "its seal is damaged"
        count = _count(path)
        if count is None:
            return "its header is damaged"
        if int(number) == count and not _waits(path) and checksum != _checksum(path):
            return "a byte is not as it was written"
    return None


def make(base: sqlite3.Connection, path: Path) -> None:
    """Seal a catalogue as it is, unless it is sealed already (sqlite3.Error, OSError)."""
    if base.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        return  # others read: the last of them seals it
    with _nobody_writes(base):
        seal, number = path.with_name(path.name + SUFFIX), _count(path)
        if number is None or _waits(path):
            return
        if seal.exists() and seal.read_bytes().startswith(f"{number} ".encode()):
            return  # what differs from it is damage
        part = seal.with_name(f"{seal.name}{files.PART}")
        files.discard([part])
        handle = files.create(part)
        try:
            files.write_all(handle, _told(b"%d" % number, _checksum(path)))
        finally:
            os.close(handle)
        part.replace(seal)


@contextmanager
def _nobody_writes(base: sqlite3.Connection) -> Iterator[None]:
    base.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        base.execute("ROLLBACK")


def _count(path: Path) -> int | None:
    """Return how often a file was written; None: its header gives two numbers."""
    with path.open("rb") as file:
        header = file.read(100)
    first, second = header[24:28], header[92:96]  # file change counter, and the one of the version number behind it
    return int.from_bytes(first, "big") if first == second else None


def _waits(path: Path) -> bool:
    """Whether anything is in the log that is not in the file, or only in part."""
    log = path.with_name(f"{path.name}-wal")
    return log.exists() and log.stat().st_size > 0


def _told(number: bytes, checksum: bytes) -> bytes:
    """Return what a seal's file holds."""
    told = number + b" " + checksum
    return told + b" %016x\n" % records.checksum(told)


def _checksum(path: Path) -> bytes:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return b"%016x" % digest.intdigest()
