"""Writing one commit behind the others of a journal, or into a segment of its own: rows, a sync, a commit, a sync.

Whatever is cut off at whatever byte, the commit before it is there. It does not know what rows mean, names of sessions,
or locks: whoever appends holds the session's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.sessions import files, locks, records
from longspan.sessions.journal import Journal, last_segment
from longspan.sessions.records import RowsMeta
from longspan.sessions.rows import Source


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
        known = self._known.places(source.stream).told() if self._known is not None else {}
        for piece in source.pieces():
            numbers: list[int] = []
            sizes: list[int] = []
            sums: list[int] = []
            kept: list[memoryview] = []
            at = 0
            for i, size in enumerate(piece.sizes):
                row, number = piece.data[at : at + size], source.numbers[piece.first + i]
                at += size
                checksum = records.checksum(row)
                if known.get(number) == (size, checksum):
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
