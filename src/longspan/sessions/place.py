"""Where sessions lie, and how one is found, held and opened, with what goes wrong told in people's words.

It does not write.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TypeVar

from longspan import settings
from longspan.errors import SessionCorruptError, SessionError, SessionNotFoundError, UsageError
from longspan.sessions.catalogue import Catalogue
from longspan.sessions.journal import DamageError, Journal, MissingError
from longspan.sessions.locks import locked
from longspan.sessions.manifest import Manifest, NewerFormatError, VanishedError, damage, later, manifest_of
from longspan.sessions.records import LaterError

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_T = TypeVar("_T")


class SessionPlace:
    """Sessions under one folder."""

    def __init__(self, root: Path | None = None) -> None:
        """Take the folder of all sessions; None: the user's."""
        self.root = (settings.sessions_folder() if root is None else Path(root)).absolute()
        self.catalogue = Catalogue(self.root)

    def names(self) -> list[str]:
        """Return the names of all sessions, damaged ones included, in order. Raises SessionError."""
        try:
            with os.scandir(self.root) as found:  # which knows of each whether it is a folder
                return sorted(each.name for each in found if NAME.fullmatch(each.name) and each.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SessionError(f"can't list the sessions in {self.root}: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        """Tell whether a session of that name is there, whole or damaged.

        Raises UsageError for a bad name, SessionError if the disk refuses.
        """
        folder = self.folder(name)
        try:
            return folder.is_dir()
        except OSError as error:
            raise SessionError(f"can't look for session {name!r} in {self.root}: {error.strerror}") from error

    def folder(self, name: str) -> Path:
        """Return where a session of that name lies. Raises UsageError for what can't be one."""
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} can't name a session: use 1 to 100 letters (a-z), digits, dots, underscores and "
                "hyphens, not starting with a dot"
            )
        return self.root / name

    def lock(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        """Hold a session against all other processes (and threads) that save or remove it (`locks.locked`)."""
        return locked(self.root / f".{name}.lock", self.folder(name), wait)

    def existing(self, name: str) -> Path:
        """Return where a session lies. Raises SessionNotFoundError, which lists those that are, and UsageError."""
        folder = self.folder(name)
        if not folder.is_dir():
            saved = ", ".join(self.names())
            raise SessionNotFoundError(
                f"no session {name!r} in {self.root}: " + (f"choose one of {saved}" if saved else "none is saved yet")
            )
        return folder

    def opened(self, name: str, folder: Path) -> tuple[Journal, Manifest, Path]:
        """Return a session's journal, its last commit, and the segment that this lies in, in people's words."""
        row = self.catalogue.row(name)
        try:
            journal = Journal.open(folder, None if row is None else (row.file, row.end))
            commit = journal.commit()
        except LaterError as error:
            raise NewerFormatError(later(name, folder, str(error))) from error
        except DamageError as error:
            raise self.told(name, error) from error
        path = journal.segments[commit.segment].path
        return journal, manifest_of(commit.told, name, path), path

    def told(self, name: str, error: DamageError) -> SessionCorruptError:
        """Return damage as people are told of it."""
        kind = VanishedError if isinstance(error, MissingError) else SessionCorruptError
        return kind(damage(name, error.path, str(error)))

    def steadily(self, name: str, read: Callable[[Path], _T], wait: bool = True) -> _T:
        """Read without the lock; if a file is missing, once more with it, for a commit may have passed by.

        Raises BlockingIOError if the lock is needed, held by another, and `wait` is false.
        """
        try:
            try:
                return read(self.existing(name))
            except VanishedError as missing:
                with ExitStack() as stack:
                    try:
                        stack.enter_context(self.lock(name, wait))
                    except BlockingIOError:
                        raise
                    except OSError:  # a read-only disk, say, where nothing can have changed either
                        raise missing from None
                    return read(self.existing(name))
        except (SessionError, BlockingIOError):  # some of the first are an OSError too
            raise
        except DamageError as error:
            raise self.told(name, error) from error
        except OSError as error:
            raise SessionError(
                f"session {name!r} can't be read ({error}): make {self.root / name} and its files readable to you"
            ) from error


def size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, as far as they can be seen."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
