"""An exclusive lock between processes (and threads) that save or remove the same session.

Advisory: it binds only those that ask for it. The operating system frees it when its holder dies, so no lock
is ever stale. This module knows nothing of what the lock protects, except the folder whose end makes the lock
file superfluous.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int, wait: bool) -> None:
        while True:
            try:
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                return
            except OSError as error:
                if not wait:
                    raise BlockingIOError(error.errno, "locked by another process") from error
                time.sleep(0.05)

    def _unlock(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(handle: int, wait: bool) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(handle: int) -> None:
        # Closing is not enough: a process forked meanwhile shares the open file, and with it the lock.
        fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def locked(path: Path, folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, which guards `folder`, for the length of a `with` block.

    Raises BlockingIOError if another holds it and `wait` is false, OSError where the lock file can't be made
    or the file system has no locks.
    """
    with contextlib.ExitStack() as stack:  # every step of letting go is taken, whatever interrupts another
        handle = _acquire(path, wait)
        stack.callback(os.close, handle)
        stack.callback(_unlock, handle)
        stack.callback(_remove_if_useless, path, folder)
        yield


def take(path: Path) -> int:
    """Return an open file that is locked as long as it is open, made where it is not there (errors: `locked`)."""
    return _acquire(path, wait=False)


def _acquire(path: Path, wait: bool) -> int:
    """Return an open, locked file that still has the name `path`."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        try:
            _lock(handle, wait)
            if _still_named(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _remove_if_useless(path: Path, folder: Path) -> None:
    """Remove the lock file, while it is held, if what it guards is gone: whoever waits for it makes a new one."""
    with contextlib.suppress(OSError):
        if not folder.exists():
            path.unlink()


def _still_named(handle: int, path: Path) -> bool:
    """Tell whether `path` names the open file: its last holder may have removed it while we waited."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
