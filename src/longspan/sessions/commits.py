"""How a commit reaches the disk, and what is told and undone when it does not.

Order is everything here: blobs are whole and synced, their names are synced, and only then does one rename
put the manifest that names them in place. This module knows nothing of what the blobs hold, of locks, or of
other commits.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from longspan.errors import SaveError
from longspan.sessions import blobs
from longspan.sessions.manifest import MANIFEST, Manifest, seal


def commit(folder: Path, name: str, write: Callable[[list[Path]], Manifest]) -> Manifest:
    """Let `write` write the blobs, then put in place the manifest that it returns.

    `write` enters every file it makes in the list it is given, before it makes it. If anything fails, an
    interrupt included, they are removed again, and so is the folder if it holds nothing else.

    Raises OSError as the disk does, SaveError if the commit is in place but may not survive a power cut.
    """
    fresh: list[Path] = []
    raw = b""
    try:
        blobs.make_folder(folder)
        manifest = write(fresh)
        blobs.sync_folder(folder)  # the blobs' names must last before a manifest relies on them
        raw = seal(manifest)
        part, _, _ = blobs.write_part(folder, [raw], fresh)
        part.replace(folder / MANIFEST)
        blobs.sync_folder(folder)
    except BaseException as error:
        # The disk says which commit holds: an interrupt may have come right after the manifest's replacement.
        if raw and _is_in_place(folder / MANIFEST, raw):
            if isinstance(error, OSError):
                raise SaveError(
                    f"session {name!r} was written to {folder}, but the disk did not confirm it "
                    f"({error.strerror or error}): save it again"
                ) from error
            raise
        blobs.discard(fresh)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only an empty one goes: a first save that failed leaves nothing
        raise
    return manifest


def failure(folder: Path, name: str, error: OSError, needed: int | None = None) -> str:
    """Return the one line that tells why saving fails; `needed` is the size of the new blobs, where that is known."""
    room = "it needs a folder of its own" if needed is None else f"it needs {_size(needed)}"
    with contextlib.suppress(OSError, StopIteration):
        place = next(path for path in (folder, *folder.parents) if path.is_dir())
        room += f", {_size(shutil.disk_usage(place).free)} is free there"
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    fix = "free some space" if full else "make the folder writable"
    return (
        f"can't save session {name!r} in {folder} ({error.strerror or error}): {room}; {fix}, or set "
        "LONGSPAN_SESSIONS to another folder; what was saved before is untouched"
    )


def _is_in_place(path: Path, raw: bytes) -> bool:
    """Tell whether the manifest is the new one; say yes where that can't be told: it removes nothing."""
    try:
        return path.read_bytes() == raw
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _size(count: int) -> str:
    """Return a size as people read it."""
    if count < 1024:
        return f"{count} bytes"
    amount, units = count / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{amount:.1f} {units[0]}"
