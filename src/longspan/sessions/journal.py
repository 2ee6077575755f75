"""One session's journal on disk: segments that follow one another, read up to the last whole commit, and appended to.

A segment is a file of records (`records.py`). The first says which segments it follows and how many bytes of each
count, so that a fork is a new segment after the ones it shares (by a second name of the same file): nothing is copied,
and either may go first. Only the last segment is ever written to, and only behind its last commit: rows, then, once
these are synced, one commit record, then a sync again. Whatever is cut off at whatever byte, the commit before it is
there.
It does not know what rows mean, names of sessions, or locks: whoever appends holds the session's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from longspan.sessions import files, locks, records
from longspan.sessions.records import BrokenError, LaterError, Record, RowsMeta
from longspan.sessions.rows import Source

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


@dataclass(frozen=True)
class Place:
    """Where a row lies."""

    segment: int
    offset: int
    size: int
    checksum: int


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
    _streams: dict[tuple[str, ...], dict[int, Place]] | None = None

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

    def places(self, stream: Sequence[str]) -> dict[int, Place]:
        """Return where the newest of each row of a stream lies, by its number (DamageError: a record tells no rows)."""
        if self._streams is None:
            self._streams = {}
            for segment, record in self._rows:
                self._enter(segment, record)
        return self._streams.setdefault(tuple(stream), {})

    def read(self, places: Sequence[Place], buffer: memoryview) -> None:
        """Fill a buffer with rows that lie one after the other, each checked. Raises DamageError, OSError."""
        first = places[0]
        segment = self.segments[first.segment]
        if files.read_into(segment.handle, buffer, first.offset) < len(buffer):
            raise DamageError(segment.path, "is cut short", first.offset)
        at = 0
        for place in places:
            if records.checksum(buffer[at : at + place.size]) != place.checksum:
                raise DamageError(segment.path, "fails its checksum", place.offset)
            at += place.size

    def ahead(self, place: Place, count: int) -> None:
        """Have the system bring up so many bytes from where a row lies, in the background."""
        files.will_read(self.segments[place.segment].handle, place.offset, count)

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

    def _enter(self, segment: int, record: Record) -> None:
        assert self._streams is not None, "made before"
        try:
            rows = records.decode_rows(record)
        except BrokenError as error:
            raise DamageError(self.segments[segment].path, str(error), error.at) from error
        known, offset = self._streams.setdefault(rows.stream, {}), record.data_at
        for number, size, checksum in zip(rows.numbers, rows.sizes, rows.checksums, strict=True):
            known[number] = Place(segment, offset, size, checksum)
            offset += size


class Appender:
    """Writes the rows of one commit, and then the commit. To be used under the session's lock."""

    whole = False
    """Whether the disk holds the commit: it stays then, though Ctrl-C came before it was returned."""

    def __init__(self, folder: Path, number: int, known: Journal | None = None) -> None:
        """Begin behind the last commit of a journal, whose rows count on (OSError).

        Args:
            folder: of the session.
            number: of the commit.
            known: the journal; None: a new segment that stands alone.
        """
        self.folder, self.number, self._known = folder, number, known
        self._new: Path | None = None
        if known is None:
            newest = last_segment(folder)
            self._begin(0 if newest is None else int(newest.name[:6]) + 1, ())
            return
        self.path, self._salt, self._start = known.last.path, known.last.salt, known.end
        self._handle = files.open_to_write(self.path)
        try:
            if known.tail:
                os.ftruncate(self._handle, self._start)
            os.lseek(self._handle, self._start, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    @classmethod
    def alone(cls, path: Path, number: int) -> Appender:
        """Return one that writes a segment of any name, which stands alone (BlockingIOError: another does; OSError)."""
        made = cls.__new__(cls)
        made.folder, made.number, made._known = path.parent, number, None
        made._begin(0, (), path)
        return made

    @classmethod
    def after(cls, folder: Path, known: Journal, shared: Sequence[tuple[str, int]]) -> Appender:
        """Return one that begins a new segment after shared ones, whose rows count on (OSError)."""
        made = cls.__new__(cls)
        made.folder, made.number, made._known = folder, known.number + 1, known
        made._begin(int(known.last.path.name[:6]) + 1, shared)
        return made

    def _begin(self, ordinal: int, before: Sequence[tuple[str, int]], path: Path | None = None) -> None:
        self._salt, self._start = secrets.randbits(64), 0
        self.path = path or self.folder / f"{ordinal:06d}-{self._salt:016x}.journal"
        self._new = self.path.with_name(f".{self.path.name}{files.PART}")
        self._handle = files.create(self._new) if path is None else locks.take(self._new)
        try:
            os.ftruncate(self._handle, 0)  # a segment that stands alone may find what an interrupted one left
            files.write_all(self._handle, records.encode_head(self._salt, before))
        except BaseException:
            self.undo()
            raise

    def write(self, source: Source) -> None:
        """Write the rows of a stream that are not there as they are. Raises OSError."""
        known = self._known.places(source.stream) if self._known is not None else {}
        for piece in source.pieces():
            numbers: list[int] = []
            sizes: list[int] = []
            sums: list[int] = []
            kept: list[memoryview] = []
            at = 0
            for i, size in enumerate(piece.sizes):
                row, number = piece.data[at : at + size], source.numbers[piece.first + i]
                at += size
                checksum, place = records.checksum(row), known.get(number)
                if place is not None and (place.size, place.checksum) == (size, checksum):
                    continue
                numbers.append(number)
                sizes.append(size)
                sums.append(checksum)
                kept.append(row)
            if numbers:
                meta = records.encode_rows(RowsMeta(source.stream, numbers, sizes, sums))
                total = sum(sizes)
                files.write_all(self._handle, records.encode(records.ROWS, self.number, meta, total, self._salt))
                whole = len(kept) == len(piece.sizes)
                for row in [piece.data] if whole else kept:
                    files.write_all(self._handle, row)
                files.write_all(self._handle, records.padding(total))

    def commit(self, told: dict[str, Any]) -> tuple[str, int]:
        """Make what was written last, and return the segment's name and where the commit ends. Raises OSError."""
        os.fsync(self._handle)  # rows first: a commit must not reach the disk before them
        meta = json.dumps(told, allow_nan=False, separators=(",", ":")).encode()
        files.write_all(self._handle, records.encode(records.COMMIT, self.number, meta, 0, self._salt))
        os.fsync(self._handle)
        self.whole = True
        end = os.lseek(self._handle, 0, os.SEEK_CUR)
        try:
            if self._new is not None:
                self._new.replace(self.path)
                files.sync_folder(self.folder)
        except OSError:
            self.whole = False
            raise
        self.close()
        return self.path.name, end

    def undo(self) -> None:
        """Leave the files as they were, as far as that can be done; where the commit is whole, it is what they hold."""
        if self._handle < 0:
            return
        if self.whole:
            with contextlib.suppress(OSError):
                if self._new is not None and self._new.exists():
                    self._new.replace(self.path)
                    files.sync_folder(self.folder)
        elif self._new is not None:
            files.discard([self._new, self.path])
        else:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._start)
        self.close()

    def close(self) -> None:
        """Close the file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


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
