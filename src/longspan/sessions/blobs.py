"""Files that are whole or not there: written under a temporary name, synced, then named by their content.

A blob is one safetensors file of named tensors, or one JSON file of named texts. The safetensors header is
written here (its layout is public and short): that way tensors go to disk one piece at a time, hashed on the
way, without a second copy in memory, and a full disk is an `OSError` at a known place. Reading is left to
safetensors. This module knows nothing of sessions, manifests or locks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from longspan.errors import UsageError

if TYPE_CHECKING:  # torch takes a second to import, and listing sessions needs none of it
    from torch import Tensor

Piece: TypeAlias = bytes | memoryview
PIECE = 8 * 2**20  # bytes hashed, written and read at a time
PART = ".part"  # ends the name of a file that is not whole yet
TENSORS = ".safetensors"
TEXTS = ".json"

# torch's names of what safetensors holds -> safetensors' own
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}


@dataclass(frozen=True)
class Blob:
    """One written file: its name inside its folder, its size and its checksum."""

    file: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Payload:
    """What a blob will hold: its size is known before the first byte is written."""

    suffix: str
    bytes: int
    pieces: Callable[[], Iterator[Piece]]


class DamageError(Exception):
    """A blob is not what was written; the message says how, without the file's name."""


class MissingError(DamageError):
    """A blob is not there (any more)."""


def checksum_of(data: bytes) -> str:
    """Return the checksum of bytes in memory."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def text_payload(texts: Mapping[str, str]) -> Payload:
    """Return the payload of named texts."""
    # Text out of broken documents may hold lone surrogates: they come back as they went in.
    data = json.dumps(dict(texts), ensure_ascii=False).encode("utf-8", "surrogatepass")
    return Payload(TEXTS, len(data), lambda: _cut(memoryview(data)))


def tensor_payload(group: str, tensors: Mapping[str, Tensor]) -> Payload:
    """Return the payload of one group of tensors, which must not change until it is written.

    Raises UsageError for a tensor that safetensors can't hold.
    """
    header: dict[str, object] = {}
    # Widest items first, as safetensors does it: every tensor then starts at a multiple of its item's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    at = 0
    for name, tensor in ordered:
        dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or str(tensor.layout) != "torch.strided" or tensor.is_meta or name == "__metadata__":
            raise UsageError(
                f"tensor {name!r} of group {group!r} can't be saved: safetensors holds no such tensor "
                f"({tensor.dtype}, {tensor.layout}, on {tensor.device})"
            )
        shape = list(tensor.shape)
        if dtype == "F4":  # torch packs two to an item, safetensors counts them singly
            shape[-1] *= 2
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text

    def pieces() -> Iterator[Piece]:
        yield head
        for _, tensor in ordered:
            yield from _cut(_raw(tensor))

    return Payload(TENSORS, len(head) + at, pieces)


def write_blob(folder: Path, payload: Payload, fresh: list[Path]) -> Blob:
    """Write one blob into `folder`; each file made on the way is entered in `fresh` first, to be undone by.

    Raises OSError as the disk does, UsageError where the safetensors installed here could not read it back.
    """
    part, size, checksum = write_part(folder, payload.pieces(), fresh)
    assert size == payload.bytes, f"{size} bytes written of {payload.bytes}"
    if payload.suffix == TENSORS:
        _check_header(part)
    final = folder / f"{checksum}{payload.suffix}"
    if not final.exists():
        fresh.append(final)
    part.replace(final)  # over the same content, should it be there: that heals a damaged file
    return Blob(final.name, size, checksum)


def write_part(folder: Path, pieces: Iterable[Piece], fresh: list[Path]) -> tuple[Path, int, str]:
    """Write and sync a file under a temporary name; return its path, size and checksum. Raises OSError."""
    part = folder / f".{secrets.token_hex(8)}{PART}"
    fresh.append(part)
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    # Windows alone has O_BINARY, and would translate line ends without it.
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            rest = memoryview(piece)
            while rest:  # a write may take less than it was given
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return part, size, digest.hexdigest()


def check_size(path: Path, blob: Blob) -> None:
    """Look at the file's size alone. Raises as `check_blob`."""
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise MissingError("is missing") from error
    if size != blob.bytes:
        raise DamageError(f"has {size} bytes, not {blob.bytes}")


def check_blob(path: Path, blob: Blob) -> None:
    """Read the whole file once.

    Raises DamageError if it is not what was written, MissingError if it is not there, OSError.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != blob.bytes:
                raise DamageError(f"has {size} bytes, not {blob.bytes}")
            piece = memoryview(bytearray(min(PIECE, max(size, 1))))
            while count := file.readinto(piece):
                digest.update(piece[:count])
    except FileNotFoundError as error:
        raise MissingError("is missing") from error
    except OSError as error:
        if error.errno != errno.EIO:  # no right to read it, say: nobody should remove a session for that
            raise
        raise DamageError(f"can't be read ({error.strerror})") from error
    if digest.hexdigest() != blob.checksum:
        raise DamageError("fails its checksum")


def read_tensors(path: Path, blob: Blob) -> dict[str, Tensor]:
    """Return a blob's tensors, on the CPU and checked. Raises as `check_blob`.

    Their memory is the file's, mapped privately: it is read again as it is touched, writing to it leaves the
    file as it is, and what was loaded stays when the file is replaced or removed.
    """
    import safetensors.torch as st
    from safetensors import SafetensorError

    check_blob(path, blob)
    try:
        # Windows can't remove or replace a file that is mapped, so a copy is made there.
        loaded = st.load(path.read_bytes()) if sys.platform == "win32" else st.load_file(path)
    except FileNotFoundError as error:
        raise MissingError("is missing") from error
    except SafetensorError as error:  # the checksum holds: this safetensors is too old for what is in the file
        raise DamageError(f"can't be read by safetensors ({error})") from error
    except RuntimeError as error:  # torch's own: it opens the file a second time, to map it
        if not path.exists():
            raise MissingError("is missing") from error
        raise OSError(str(error)) from error
    return dict(loaded)


def read_texts(path: Path, blob: Blob) -> dict[str, str]:
    """Return a blob's texts, checked. Raises as `check_blob`."""
    check_blob(path, blob)
    try:
        texts = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    except FileNotFoundError as error:
        raise MissingError("is missing") from error
    except ValueError as error:
        raise DamageError(f"is not JSON ({error})") from error
    return {str(key): str(text) for key, text in texts.items()}


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


def sweep(folder: Path, keep: set[str] | None) -> None:
    """Remove temporary files and, unless `keep` is None, the blobs it doesn't name, as far as can be."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            ours = path.suffix in (TENSORS, TEXTS) and len(path.stem) == 32
            if (path.suffix == PART and path.name.startswith(".")) or (
                keep is not None and ours and path.name not in keep
            ):
                discard([path])


def discard(paths: Iterable[Path]) -> None:
    """Remove files as far as that can be done."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _raw(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; conjugates and negatives that torch only noted are carried out."""
    import torch

    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return held.reshape(-1).view(torch.uint8).numpy().data


def _cut(data: memoryview) -> Iterator[memoryview]:
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def _check_header(path: Path) -> None:
    """Let safetensors parse what was just written, before anything depends on it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise UsageError(f"the tensors can't be saved: safetensors could not read them back ({error})") from error
