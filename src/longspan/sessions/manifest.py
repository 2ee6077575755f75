"""What a commit of a session consists of, as one sealed JSON file: whoever holds it knows every other file.

The seal is a checksum over the bytes of the inner object. It is the same in every format version, so that
damage and a newer version can be told apart. This module knows nothing of tensors or of how files get
written.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeAlias, Union

from longspan.errors import SessionCorruptError, SessionMismatchError, UsageError
from longspan.sessions.blobs import TENSORS, TEXTS, Blob, checksum_of

JSON: TypeAlias = Union[bool, int, float, str, Sequence["JSON"], Mapping[str, "JSON"], None]  # noqa: UP007

FORMAT = 1
MANIFEST = "manifest.json"

_HEAD, _MIDDLE, _TAIL = b'{"checksum": "', b'", "manifest": ', b"}\n"
_BLOB_FILE = re.compile(rf"[0-9a-f]{{32}}({re.escape(TENSORS)}|{re.escape(TEXTS)})")


class VanishedError(SessionCorruptError):
    """A file is not there: damage, unless another process has just committed or removed the session."""


class NewerFormatError(SessionCorruptError):
    """The session was written by a later version, and is fine."""


@dataclass(frozen=True)
class Manifest:
    """One commit: when, of what, and the blobs that hold it (one a group of tensors, one for all texts)."""

    name: str
    created: datetime
    saved: datetime
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    groups: Mapping[str, Blob]
    texts: Blob

    @property
    def files(self) -> dict[str, Blob]:
        """Return each blob by its file's name; groups with the same content share a file."""
        return {blob.file: blob for blob in [*self.groups.values(), self.texts]}

    @property
    def bytes(self) -> int:
        """Return the size of all blobs together."""
        return sum(blob.bytes for blob in self.files.values())


def as_json(what: str, value: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return a mapping as JSON gives it back (tuples as lists). Raises UsageError if JSON can't hold it."""
    try:
        held: dict[str, JSON] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the session's {what} can't be saved as JSON: {error}") from error
    return held


def seal(manifest: Manifest) -> bytes:
    """Return the manifest file's bytes."""
    inner = {
        "format": FORMAT,
        "name": manifest.name,
        "created": manifest.created.isoformat(),
        "saved": manifest.saved.isoformat(),
        "identity": manifest.identity,
        "state": manifest.state,
        "groups": {group: asdict(blob) for group, blob in manifest.groups.items()},
        "texts": asdict(manifest.texts),
    }
    return _sealed(json.dumps(inner, indent=1, allow_nan=False).encode())


def read_manifest(folder: Path, name: str) -> Manifest:
    """Read and check the manifest of the session in `folder`.

    Raises VanishedError if there is none, NewerFormatError for a later version's, SessionCorruptError for
    damage, OSError.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise VanishedError(damage(name, path, "is missing")) from error
    except OSError as error:
        if error.errno != errno.EIO:  # no right to read it, say: nobody should remove a session for that
            raise
        raise SessionCorruptError(damage(name, path, f"can't be read ({error.strerror})")) from error
    body = raw[len(_HEAD) + 32 + len(_MIDDLE) : -len(_TAIL)]
    if raw != _sealed(body):
        raise SessionCorruptError(damage(name, path, "fails its checksum"))
    try:
        inner = json.loads(body)
        if inner["format"] > FORMAT:
            raise NewerFormatError(
                f"session {name!r} was saved by a later version of longspan: {path} has format "
                f"{inner['format']}, and this version reads up to {FORMAT}; update longspan"
            )
        return Manifest(
            name=name,
            created=datetime.fromisoformat(inner["created"]),
            saved=datetime.fromisoformat(inner["saved"]),
            identity=dict(inner["identity"]),
            state=dict(inner["state"]),
            groups={group: _blob(blob) for group, blob in inner["groups"].items()},
            texts=_blob(inner["texts"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SessionCorruptError(damage(name, path, "is not a session's manifest")) from error


def compare(manifest: Manifest, asked: Mapping[str, JSON]) -> None:
    """Raise SessionMismatchError at the first key of `asked` that was saved with another value (none is null)."""
    for key, value in asked.items():
        saved = manifest.identity.get(key)
        if saved == value:
            continue
        raise SessionMismatchError(
            f"session {manifest.name!r} was saved with {_told(key, saved)}, and {_told(key, value)} is asked for: "
            "use what it was saved with, or another session name, or remove it with "
            f"`longspan session rm {manifest.name}`"
        )


def damage(name: str, path: Path, what: str) -> str:
    """Return the one line that tells of a damaged file, and what can be done."""
    return (
        f"session {name!r} is damaged: {path} {what}; restore the file from a backup, or remove the session "
        f"with `longspan session rm {name}` and read the documents again"
    )


def _sealed(body: bytes) -> bytes:
    return _HEAD + checksum_of(body).encode() + _MIDDLE + body + _TAIL


def _blob(entry: dict[str, object]) -> Blob:
    """Return one blob's entry; only a name that we could have given is taken: it leads nowhere else."""
    file, size, checksum = entry["file"], entry["bytes"], entry["checksum"]
    if not (isinstance(file, str) and isinstance(size, int) and isinstance(checksum, str)):
        raise TypeError("not a blob's entry")
    if not _BLOB_FILE.fullmatch(file):
        raise ValueError("not a blob's name")
    return Blob(file, size, checksum)


def _told(key: str, value: JSON) -> str:
    text = json.dumps(value)
    return f"no {key}" if value is None else f"{key} = {text if len(text) <= 120 else f'{text[:117]}...'}"
