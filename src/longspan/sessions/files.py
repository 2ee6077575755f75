"""Files and folders that last: made private, written whole, synced with their names.

This module knows nothing of what files hold.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

PART = ".part"
"""Ends the name of a file or folder that is not whole yet."""
_TOGETHER = 1024  # buffers that a read may fill
_BINARY = getattr(os, "O_BINARY", 0)  # Windows alone has it, and would translate line ends without it


def create(path: Path) -> int:
    """Return the handle of a new private file, open for reading and writing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)


def open_to_write(path: Path) -> int:
    """Return the handle of a file that is there, open for reading and writing. Raises OSError."""
    return os.open(path, os.O_RDWR | _BINARY)


def open_to_read(path: Path) -> int:
    """Return the handle of a file that is there. Raises OSError."""
    return os.open(path, os.O_RDONLY | _BINARY)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all of it where the file stands: a write may take less than it was given. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Return so many bytes from there on, fewer where the file ends. Raises OSError."""
    if hasattr(os, "pread"):
        return os.pread(handle, count, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)


def read_into(handle: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer from there on, and return how many bytes there were. Raises OSError."""
    done = 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            count = os.preadv(handle, [buffer[done:]], offset + done)
        else:
            piece = read_at(handle, len(buffer) - done, offset + done)
            count = len(piece)
            buffer[done : done + count] = piece
        if count == 0:
            break
        done += count
    return done


def scatter(handle: int, parts: Sequence[memoryview], offset: int) -> int:
    """Fill several buffers with what follows one after the other from there on; otherwise as `read_into`."""
    done = first = 0
    while first < len(parts):
        some = parts[first : first + _TOGETHER]
        wanted = sum(len(part) for part in some)
        count = os.preadv(handle, some, offset + done) if hasattr(os, "preadv") else 0
        if count < wanted:  # a read may give less than it was asked for
            at = 0
            for part in some:
                got = max(0, min(len(part), count - at))
                more = read_into(handle, part[got:], offset + done + at + got)
                at += got + more
                if got + more < len(part):
                    return done + at
            count = at
        done, first = done + count, first + len(some)
    return done


def will_read(handle: int, offset: int, count: int) -> None:
    """Let the system bring bytes up that will be read next, where it can."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(handle, offset, count, os.POSIX_FADV_WILLNEED)


def make_folder(folder: Path) -> None:
    """Make a private folder and those above it, each entered durably in the one above. Raises OSError."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the platform can. Raises OSError."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems can't sync a folder
            raise
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path, count: int) -> None:
    """Give a file a second name, or copy its first `count` bytes where that can't be. Raises OSError."""
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOSPC):
            raise
    made = create(target)
    try:
        with source.open("rb") as read, os.fdopen(os.dup(made), "wb") as written:
            left = count
            while left and (piece := read.read(min(left, 8 * 2**20))):
                written.write(piece)
                left -= len(piece)
        os.fsync(made)
    finally:
        os.close(made)


def discard(paths: Iterable[Path]) -> None:
    """Remove files and folders as far as that can be done."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def size(count: int) -> str:
    """Return a size as people read it."""
    if count < 1024:
        return f"{count} bytes"
    amount, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.1f} {units[0]}"
