"""Sessions in the format before journals: a manifest in JSON, and blobs named by their content. Read, never written.

The next save of such a session writes a journal in its place. The seal of the manifest is a checksum over the bytes of
its inner object; tensors lie in safetensors files, texts in one JSON file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from longspan.errors import SessionCorruptError
from longspan.sessions.manifest import Manifest, NewerFormatError, VanishedError, damage, later

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
_HEAD, _MIDDLE, _TAIL = b'{"checksum": "', b'", "manifest": ', b"}\n"
_BLOB = re.compile(r"[0-9a-f]{32}\.(safetensors|json)")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Blob:
    """One file: its name inside its folder, its size and its checksum."""

    file: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Old:
    """A session of the old format: what its manifest says, and where the rest is."""

    manifest: Manifest
    groups: dict[str, Blob]
    texts: Blob

    @property
    def bytes(self) -> int:
        """Bytes of all blobs together; groups with the same content share one."""
        return sum(blob.bytes for blob in {blob.file: blob for blob in [*self.groups.values(), self.texts]}.values())


def is_old(folder: Path) -> bool:
    """Whether a folder holds a session of the old format (OSError)."""
    return (folder / MANIFEST).is_file()


def is_part(path: Path) -> bool:
    """Whether a file is one of the old format's."""
    return path.name == MANIFEST or _BLOB.fullmatch(path.name) is not None


def read(folder: Path, name: str) -> Old:
    """Read and check the manifest; of the blobs the sizes are looked at.

    Raises VanishedError if a file is not there, NewerFormatError for a later version's, SessionCorruptError for
    damage, OSError.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise VanishedError(damage(name, path, "is missing")) from error
    body = raw[len(_HEAD) + 32 + len(_MIDDLE) : -len(_TAIL)]
    if raw != _HEAD + _checksum(body).encode() + _MIDDLE + body + _TAIL:
        raise SessionCorruptError(damage(name, path, "fails its checksum"))
    try:
        inner = json.loads(body)
        if inner["format"] > FORMAT:
            raise NewerFormatError(later(name, path, f"has format {inner['format']}"))
        old = Old(
            Manifest(
                name,
                datetime.fromisoformat(inner["created"]),
                datetime.fromisoformat(inner["saved"]),
                dict(inner["identity"]),
                dict(inner["state"]),
            ),
            {group: _blob(blob) for group, blob in inner["groups"].items()},
            _blob(inner["texts"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SessionCorruptError(damage(name, path, "is not a session's manifest")) from error
    for blob in [*old.groups.values(), old.texts]:
        try:
            size = (folder / blob.file).stat().st_size
        except FileNotFoundError as error:
            raise VanishedError(damage(name, folder / blob.file, "is missing")) from error
        if size != blob.bytes:
            raise SessionCorruptError(damage(name, folder / blob.file, f"has {size} bytes, not {blob.bytes}"))
    return old


def tensors(folder: Path, name: str, blob: Blob) -> dict[str, Tensor]:
    """Return a group's tensors, on the CPU and checked. Raises as `read`."""

    def parse(data: bytes) -> dict[str, Tensor]:
        import safetensors.torch as st

        return dict(st.load(data))

    return _checked(folder, name, blob, parse)


def texts(folder: Path, name: str, blob: Blob) -> dict[str, str]:
    """Return a session's texts, checked. Raises as `read`."""

    def parse(data: bytes) -> dict[str, str]:
        return {str(key): str(text) for key, text in json.loads(data.decode("utf-8", "surrogatepass")).items()}

    return _checked(folder, name, blob, parse)


def problems(folder: Path, name: str) -> list[str]:
    """Return what is wrong with a session's files, a line each (OSError)."""
    try:
        old = read(folder, name)
    except SessionCorruptError as error:
        return [str(error)]
    found = []
    for blob in [*old.groups.values(), old.texts]:
        try:
            _checked(folder, name, blob, lambda data: None)
        except SessionCorruptError as error:
            found.append(str(error))
    return found


def _checked(folder: Path, name: str, blob: Blob, parse: Callable[[bytes], _T]) -> _T:
    path = folder / blob.file
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise VanishedError(damage(name, path, "is missing")) from error
    if _checksum(data) != blob.checksum:
        raise SessionCorruptError(damage(name, path, "fails its checksum"))
    try:
        return parse(data)
    except Exception as error:  # the checksum holds: what is installed here is too old for the file
        raise SessionCorruptError(damage(name, path, f"can't be read ({error})")) from error


def _checksum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _blob(entry: dict[str, Any]) -> Blob:
    """Return one blob's entry; only a name that we could have given is taken: it leads nowhere else."""
    file, size, checksum = entry["file"], entry["bytes"], entry["checksum"]
    if not (isinstance(file, str) and isinstance(size, int) and isinstance(checksum, str)):
        raise TypeError("not a blob's entry")
    if not _BLOB.fullmatch(file):
        raise ValueError("not a blob's name")
    return Blob(file, size, checksum)
