"""Named sessions on disk: each save is one commit, which is there as a whole or not at all.

A session is a folder: blobs named by their content, and one manifest that names them. A save writes new blobs
beside the old ones and replaces the manifest last, so a crash or a full disk at any byte leaves the commit
before it readable. This module knows nothing of models: it keeps JSON, tensors and texts, and what they mean
is its caller's. It imports torch only when tensors are saved or loaded.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from longspan import settings
from longspan.errors import (
    SaveError,
    SessionCorruptError,
    SessionError,
    SessionNotFoundError,
    UsageError,
)
from longspan.sessions import blobs
from longspan.sessions.commits import commit, failure
from longspan.sessions.locks import locked
from longspan.sessions.manifest import (
    JSON,
    Manifest,
    NewerFormatError,
    VanishedError,
    as_json,
    compare,
    damage,
    read_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["JSON", "SavedSession", "SessionInfo", "SessionStore"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session as it was saved; `bytes` is what its blobs take on disk."""

    name: str
    created: datetime
    saved: datetime
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, str]
    bytes: int


@dataclass(frozen=True)
class SessionInfo:
    """What is known of a session without reading its blobs.

    `problem` is None, or one line that tells what is wrong with it: then only `name` and `bytes` hold.
    """

    name: str
    created: datetime | None
    saved: datetime | None
    bytes: int
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    problem: str | None = None


class SessionStore:
    """Sessions under one folder, for any number of processes; the first save makes the folder."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (settings.sessions_folder() if root is None else Path(root)).absolute()
        self._seen: dict[str, Mapping[str, blobs.Blob]] = {}  # groups as this store last loaded or saved them

    def save(
        self,
        name: str,
        identity: Mapping[str, JSON],
        state: Mapping[str, JSON],
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        unchanged: Collection[str] = (),
    ) -> Path:
        """Commit a session and return its folder; what was saved under that name before is replaced.

        The groups of tensors in `unchanged` are kept as this store last loaded or saved them (else as they
        are on disk) and not written again; the others must not be changed by another thread meanwhile.

        Raises UsageError for a name, a JSON value, a tensor or an unchanged group that can't be saved,
        SessionCorruptError if an unchanged group is damaged or the session is of a later version, and
        SaveError if the disk fails or another process has replaced an unchanged group: what was saved before
        is untouched then.
        """
        folder = self._folder(name)
        if both := sorted(set(tensors) & set(unchanged)):
            raise UsageError(f"group {both[0]!r} is given as unchanged and with tensors: choose one")
        identity, state = as_json("identity", identity), as_json("state", state)
        payloads = {group: blobs.tensor_payload(group, held) for group, held in tensors.items()}
        text_payload = blobs.text_payload(texts)
        needed = sum(payload.bytes for payload in payloads.values()) + text_payload.bytes
        try:
            blobs.make_folder(self.root)
            with self._lock(name):
                previous = self._previous(name, strict=bool(unchanged))
                groups = {group: self._kept(name, group, previous) for group in unchanged}

                def write(fresh: list[Path]) -> Manifest:
                    # What a crash left takes room. Where no manifest can be read, blobs stay until one is
                    # written.
                    blobs.sweep(folder, keep=set(previous.files) if previous else None)
                    for group, payload in payloads.items():
                        groups[group] = blobs.write_blob(folder, payload, fresh)
                    written = blobs.write_blob(folder, text_payload, fresh)
                    now = datetime.now(UTC)
                    created = previous.created if previous else now
                    return Manifest(name, created, now, identity, state, groups, written)

                manifest = commit(folder, name, write)
                self._seen[name] = manifest.groups
                blobs.sweep(folder, keep=set(manifest.files))
        except SessionError:  # some are an OSError too
            raise
        except OSError as error:
            raise SaveError(failure(folder, name, error, needed)) from error
        return folder

    def check_writable(self, name: str) -> None:
        """Raise SaveError if a session of that name could not be saved: to be told before reading for hours.

        Nothing is written but a file that is gone again, and the folder of all sessions if there is none.
        """
        folder = self._folder(name)
        try:
            blobs.make_folder(self.root)
            with tempfile.TemporaryFile(dir=folder if folder.is_dir() else self.root):
                pass
        except OSError as error:
            raise SaveError(failure(folder, name, error)) from error

    def load(self, name: str, identity: Mapping[str, JSON] | None = None) -> SavedSession:
        """Return a saved session, every byte of it checked; its tensors are on the CPU.

        Raises SessionNotFoundError if there is none of that name, SessionMismatchError if a key of `identity`
        was saved with another value, SessionCorruptError for damage or a later version, UsageError for a bad
        name, SessionError if the files can't be read.
        """
        asked = as_json("identity", identity or {})

        def read(folder: Path) -> SavedSession:
            manifest = read_manifest(folder, name)
            compare(manifest, asked)
            tensors = {
                group: _checked(name, folder, blob, blobs.read_tensors) for group, blob in manifest.groups.items()
            }
            texts = _checked(name, folder, manifest.texts, blobs.read_texts)
            self._seen[name] = manifest.groups
            return SavedSession(
                name=name,
                created=manifest.created,
                saved=manifest.saved,
                identity=manifest.identity,
                state=manifest.state,
                tensors=tensors,
                texts=texts,
                bytes=manifest.bytes,
            )

        return self._steadily(name, read)

    def names(self) -> list[str]:
        """Return the names of all sessions, damaged ones included, in order. Raises SessionError."""
        try:
            return sorted(path.name for path in self.root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SessionError(f"can't list the sessions in {self.root}: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        """Tell whether a session of that name is there, whole or damaged.

        Raises UsageError for a bad name, SessionError if the disk refuses.
        """
        folder = self._folder(name)
        try:
            return folder.is_dir()
        except OSError as error:
            raise SessionError(f"can't look for session {name!r} in {self.root}: {error.strerror}") from error

    def show(self, name: str) -> SessionInfo:
        """Return what is known of a session; of its blobs only the sizes are looked at. Raises as `load`."""
        return self._steadily(name, partial(_info, name))

    def infos(self) -> list[SessionInfo]:
        """Return what is known of all sessions, damage being told in `problem`, without waiting for a save.

        Raises SessionError if the folder itself can't be listed.
        """
        infos = []
        for name in self.names():
            try:
                infos.append(self._steadily(name, partial(_info, name), wait=False))
            except SessionNotFoundError:  # removed since it was listed
                continue
            except BlockingIOError:
                problem = f"session {name!r} is being saved or removed by another process: look again later"
                infos.append(SessionInfo(name, None, None, _size_of(self._folder(name)), {}, {}, problem))
            except SessionError as error:
                infos.append(SessionInfo(name, None, None, _size_of(self._folder(name)), {}, {}, str(error)))
        return infos

    def remove(self, name: str) -> None:
        """Remove a session, damaged or not.

        Raises SessionNotFoundError if there is none, SessionError if the disk refuses, UsageError for a bad
        name.
        """
        folder = self._folder(name)
        try:
            self._existing(name)  # before the lock, which would make a file
            with self._lock(name):
                shutil.rmtree(self._existing(name))
        except SessionError:
            raise
        except OSError as error:
            raise SessionError(f"can't remove session {name!r} in {folder}: {error.strerror or error}") from error
        self._seen.pop(name, None)

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} can't name a session: use 1 to 100 letters (a-z), digits, dots, underscores and "
                "hyphens, not starting with a dot"
            )
        return self.root / name

    def _existing(self, name: str) -> Path:
        folder = self._folder(name)
        if not folder.is_dir():
            saved = ", ".join(self.names())
            raise SessionNotFoundError(
                f"no session {name!r} in {self.root}: " + (f"choose one of {saved}" if saved else "none is saved yet")
            )
        return folder

    def _lock(self, name: str, wait: bool = True) -> AbstractContextManager[None]:
        return locked(self.root / f".{name}.lock", self._folder(name), wait)

    def _steadily(self, name: str, read: Callable[[Path], _T], wait: bool = True) -> _T:
        """Read without the lock; if a file is missing, once more with it, for a commit may have passed by.

        Raises BlockingIOError if the lock is needed, held by another, and `wait` is false.
        """
        try:
            try:
                return read(self._existing(name))
            except VanishedError as missing:
                with ExitStack() as stack:
                    try:
                        stack.enter_context(self._lock(name, wait))
                    except BlockingIOError:
                        raise
                    except OSError:  # a read-only disk, say, where nothing can have changed either
                        raise missing from None
                    return read(self._existing(name))
        except (SessionError, BlockingIOError):  # some of the first are an OSError too
            raise
        except OSError as error:
            raise SessionError(
                f"session {name!r} can't be read ({error}): make {self.root / name} and its files readable to you"
            ) from error

    def _previous(self, name: str, strict: bool) -> Manifest | None:
        """Return the commit on disk; None if there is none or, unless `strict`, its manifest is damaged."""
        folder = self._folder(name)
        if not folder.is_dir():
            return None
        try:
            return read_manifest(folder, name)
        except NewerFormatError:
            raise
        except SessionCorruptError:
            if strict:
                raise
            return None

    def _kept(self, name: str, group: str, previous: Manifest | None) -> blobs.Blob:
        """Return the blob of an unchanged group."""
        blob = previous.groups.get(group) if previous else None
        seen = self._seen.get(name)
        if blob is None:
            raise UsageError(f"session {name!r} has no saved group {group!r} that could stay unchanged: save it whole")
        if seen is not None and seen.get(group) != blob:
            raise SaveError(
                f"can't save session {name!r}: another process has saved it since it was opened here; save it "
                "under another name, or open it again (what the other process saved is untouched)"
            )
        path = self._folder(name) / blob.file
        _check_size(name, path, blob)
        return blob


def _info(name: str, folder: Path) -> SessionInfo:
    manifest = read_manifest(folder, name)
    for blob in manifest.files.values():
        _check_size(name, folder / blob.file, blob)
    return SessionInfo(name, manifest.created, manifest.saved, manifest.bytes, manifest.identity, manifest.state)


def _checked(name: str, folder: Path, blob: blobs.Blob, read: Callable[[Path, blobs.Blob], _T]) -> _T:
    """Read a blob, and tell damage in the session's words."""
    path = folder / blob.file
    try:
        return read(path, blob)
    except blobs.MissingError as error:
        raise VanishedError(damage(name, path, str(error))) from error
    except blobs.DamageError as error:
        raise SessionCorruptError(damage(name, path, str(error))) from error


def _check_size(name: str, path: Path, blob: blobs.Blob) -> None:
    _checked(name, path.parent, blob, blobs.check_size)


def _size_of(folder: Path) -> int:
    """Return the bytes of a folder's files, as far as they can be seen."""
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
