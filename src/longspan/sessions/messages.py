"""What is told when the disk refuses a session."""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

from longspan.sessions.files import size


def failure(folder: Path, name: str, error: OSError, needed: int | None = None) -> str:
    """Return the one line that tells why saving fails; `needed` is the size of the session, where that is known."""
    room = "it needs a folder of its own" if needed is None else f"it needs up to {size(needed)}"
    with contextlib.suppress(OSError, StopIteration):
        place = next(path for path in (folder, *folder.parents) if path.is_dir())
        room += f", {size(shutil.disk_usage(place).free)} is free there"
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
    fix = "free some space" if full else "make the folder writable"
    return (
        f"can't save session {name!r} in {folder} ({error.strerror or error}): {room}; {fix}, or set "
        "LONGSPAN_SESSIONS to another folder; what was saved before is untouched"
    )
