"""One session's journal on disk: segments that follow one another, read up to the last whole commit.

A segment is a file of records (`records.py`). The first says which segments it follows and how many bytes of each
count, so that a fork is a new segment after the ones it shares (by a second name of the same file): nothing is copied,
and either may go first. Only the last segment is ever written to, and only behind its last commit: rows, then, once
these are synced, one commit record, then a sync again. Whatever is cut off at whatever byte, the commit before it is
there (`appending.py`).
It does not know what rows mean, names of sessions, or locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.sessions import files, records
from longspan.sessions.records import BrokenError, LaterError, Record, RowsMeta

if TYPE_CHECKING:  # numpy takes a tenth of a second to import, and listing sessions needs none of it
    from longspan.sessions.places import Places

SEGMENT = re.compile(r"(\d{6})-([0-9a-f]{16})\.journal")
_SCAN = 1 << 20  # bytes looked through at a time for a record behind damage


class DamageError(Exception):
    """A file is not what was written; the message says how, `path` which, and `at` where."""

    def __init__(self, path: Path, why: str, at: int | None = None) -> None:
        super().__init__(why if at is None else f"{why} at byte {at:,}")
        self.path, self.at = path, at


class MissingError(DamageError):
    """A file is not there (any more)."""


@dataclass(frozen=True)
class Segment:
    """An open file, and how many of its bytes belong to the session."""

    path: Path
    handle: int
    salt: int
    stop: int


@dataclass
class Commit:
    """A commit: its number, what it says, and where it ends."""

    number: int
    told: dict[str, Any]
    segment: int
    end: int


@dataclass(eq=False)
class Journal:
    """A journal as it was when it was opened: the files stay readable whatever becomes of their names."""

    folder: Path
    segments: list[Segment] = field(default_factory=list)
    commits: list[tuple[int, Record]] = field(default_factory=list)
    """Every commit, oldest first: the segment that it lies in, and its record."""
    tail: int = 0
    """Bytes behind the last commit, which an interrupted write left."""
    _handles: list[int] = field(default_factory=list)
    _rows: list[tuple[int, Record]] = field(default_factory=list)
    _streams: dict[tuple[str, ...], list[tuple[int, int, RowsMeta]]] | None = None
    _places: dict[tuple[str, ...], Places] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(
        cls, place: Path, acknowledged: tuple[str, int] | None = None, *, whole: bool = True, until: int | None = None
    ) -> Journal:
        """Open a journal.

        Args:
            place: the session's folder, or one segment that stands alone.
            acknowledged: a segment's name and a byte up to which it was committed, where that is known: what is missing
                before it is damage, where else it would be taken for a write that was cut off.
            whole: whether damage in the last segment is refused; else the commit before it is taken.
            until: the commit that counts as the last; None: the newest.

        Raises:
            MissingError: there is none, or a segment that it follows is not there.
            DamageError: no whole commit, or damage before one.
            LaterError: of a later format.
            KeyError: no such commit.
            OSError: as the disk does.
        """
        alone = place.is_file()
        path = place if alone else last_segment(place)
        if path is None:
            raise MissingError(place, "holds no journal")
        journal = cls(path.parent)
        weakref.finalize(journal, _close, journal._handles)
        journal._open(path, acknowledged, named=not alone, whole=whole, until=until)
        return journal

    @property
    def last(self) -> Segment:
        """The segment that is written to."""
        return self.segments[-1]

    @property
    def end(self) -> int:
        """The byte of the last segment behind the last commit."""
        return self.last.stop

    @property
    def number(self) -> int:
        """The number of the last commit."""
        return self.commits[-1][1].commit

    @property
    def bytes(self) -> int:
        """Bytes of all segments that belong to the session."""
        return sum(segment.stop for segment in self.segments)

    def commit(self, number: int | None = None) -> Commit:
        """Return a commit, the last by default (KeyError: there is none of that number; DamageError: it is no JSON)."""
        found = next((each for each in reversed(self.commits) if number in (None, each[1].commit)), None)
        if found is None:
            raise KeyError(number)
        segment, record = found
        try:
            told = json.loads(record.meta)
            if not isinstance(told, dict):
                raise ValueError("no mapping")
        except (ValueError, RecursionError) as error:
            raise DamageError(self.segments[segment].path, "holds a commit that is not JSON", record.at) from error
        return Commit(record.commit, told, segment, record.end)

    def places(self, stream: Sequence[str]) -> Places:
        """Return where the newest of each row of a stream lies (DamageError: a record tells no rows).

        Any number of threads may ask, and read.
        """
        from longspan.sessions.places import Places

        with self._lock:
            if self._streams is None:
                self._streams = {}
                for segment, record in self._rows:
                    rows = self._told(segment, record)
                    self._streams.setdefault(rows.stream, []).append((segment, record.data_at, rows))
            key = tuple(stream)
            if key not in self._places:
                self._places[key] = Places.of(self._streams.get(key, []))
            return self._places[key]

    def read(self, places: Places, buffer: memoryview) -> None:
        """Fill a buffer with rows that lie one after the other, each checked. Raises DamageError, OSError."""
        segment, start = self.segments[int(places.segments[0])], int(places.offsets[0])
        if files.read_into(segment.handle, buffer, start) < len(buffer):
            raise DamageError(segment.path, "is cut short", start)
        at = 0
        for size, checksum in zip(places.sizes.tolist(), places.checksums.tolist(), strict=True):
            if records.checksum(buffer[at : at + size]) != checksum:
                raise DamageError(segment.path, "fails its checksum", start + at)
            at += size

    def scatter(self, places: Places, parts: Sequence[memoryview]) -> None:
        """Fill buffers, equally many a row, with rows that lie one after the other, each checked (errors: `read`)."""
        segment, start = self.segments[int(places.segments[0])], int(places.offsets[0])
        if files.scatter(segment.handle, parts, start) < places.nbytes:
            raise DamageError(segment.path, "is cut short", start)
        each = len(parts) // len(places)
        for i, checksum in enumerate(places.checksums.tolist()):
            if records.checksum_of(parts[i * each : (i + 1) * each]) != checksum:
                raise DamageError(segment.path, "fails its checksum", int(places.offsets[i]))

    def ahead(self, places: Places) -> None:
        """Have the system bring up rows that lie one after the other, in the background."""
        files.will_read(self.segments[int(places.segments[0])].handle, int(places.offsets[0]), places.nbytes)

    def records(self) -> Iterable[tuple[Segment, Record]]:
        """Yield every record up to the last commit, in order."""
        for segment in self.segments:
            for record in records.scan(partial(files.read_at, segment.handle), 0, segment.stop, segment.salt):
                yield segment, record

    def close(self) -> None:
        """Close the files; what was read stays."""
        _close(self._handles)

    def _open(
        self, path: Path, acknowledged: tuple[str, int] | None, *, named: bool, whole: bool, until: int | None
    ) -> None:
        last, before = self._segment(path, None, named)
        for file, stop in before:
            if not SEGMENT.fullmatch(file):
                raise DamageError(path, f"follows {file!r}, which is no segment's name")
            self.segments.append(self._segment(self.folder / file, stop)[0])
            broken = self._read(len(self.segments) - 1)
            if broken is not None:
                raise DamageError(self.segments[-1].path, str(broken), broken.at)
        self.segments.append(last)
        index = len(before)
        broken = self._read(index)
        if until is not None:
            self.commits = [each for each in self.commits if each[1].commit <= until]
            if not self.commits or self.number != until:
                raise KeyError(until)
        end = max((record.end for segment, record in self.commits if segment == index), default=0)
        known = acknowledged[1] if acknowledged is not None and acknowledged[0] == path.name else 0
        if whole and known > last.stop:
            raise DamageError(path, f"has {last.stop:,} bytes, and {known:,} were committed")
        if whole and broken is not None and (known > end or _follows(last, broken.at)):
            raise DamageError(path, str(broken), broken.at)
        if not self.commits:
            raise DamageError(path, "holds no whole commit")
        self.segments[-1] = Segment(last.path, last.handle, last.salt, end)
        self.tail = last.stop - end
        self._rows = [(i, each) for i, each in self._rows if each.commit <= self.number]

    def _segment(self, path: Path, stop: int | None, named: bool = True) -> tuple[Segment, list[tuple[str, int]]]:
        try:
            handle = files.open_to_read(path)
        except FileNotFoundError as error:
            raise MissingError(path, "is missing") from error
        self._handles.append(handle)
        try:
            size = os.fstat(handle).st_size
            if stop is not None and size < stop:
                raise DamageError(path, f"has {size:,} bytes, and {stop:,} were committed")
            salt, before = records.decode_head(records.decode(partial(files.read_at, handle), 0, None))
            if named and path.name[7:23] != f"{salt:016x}":
                raise DamageError(path, "bears another segment's name")
        except BrokenError as error:
            raise DamageError(path, str(error), error.at) from error
        return Segment(path, handle, salt, size if stop is None else stop), before

    def _read(self, index: int) -> BrokenError | None:
        """Note a segment's records; returns where they end early."""
        segment = self.segments[index]
        try:
            for record in records.scan(partial(files.read_at, segment.handle), 0, segment.stop, segment.salt):
                if record.kind == records.COMMIT:
                    self.commits.append((index, record))
                elif record.kind == records.ROWS:
                    self._rows.append((index, record))
        except BrokenError as error:
            return error
        return None

    def _told(self, segment: int, record: Record) -> RowsMeta:
        try:
            return records.decode_rows(record)
        except BrokenError as error:
            raise DamageError(self.segments[segment].path, str(error), error.at) from error


def last_segment(folder: Path) -> Path | None:
    """Return the newest segment in a folder; None: there is none. Raises OSError."""
    return max(segments(folder), default=None)


def segments(folder: Path) -> list[Path]:
    """Return every segment in a folder. Raises OSError."""
    try:
        return [path for path in folder.iterdir() if SEGMENT.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _follows(segment: Segment, at: int) -> bool:
    """Whether a whole commit of the same segment begins behind a byte: then what is broken there was no cut."""
    start = at + records.ALIGNED
    while start < segment.stop:
        piece = files.read_at(segment.handle, min(_SCAN, segment.stop - start), start)
        found = piece.find(records.MAGIC)
        while found >= 0:
            if (start + found) % records.ALIGNED == 0:
                with contextlib.suppress(BrokenError, LaterError):
                    record = records.decode(partial(files.read_at, segment.handle), start + found, segment.salt)
                    if record.kind == records.COMMIT:
                        return True
            found = piece.find(records.MAGIC, found + 1)
        start += _SCAN
    return False


def _close(handles: list[int]) -> None:
    """Close every file; each once."""
    while handles:
        with contextlib.suppress(OSError):
            os.close(handles.pop())
