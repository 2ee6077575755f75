"""The bytes of a journal: records one after the other, each of which says how long it is and proves itself.

    record  = header | meta | zeros | data | zeros         each part begins at a multiple of 64 bytes
    header  = magic, kind, version, length of meta, 0, length of data, commit, checksum of meta, zeros, checksum

All numbers are little-endian. A header's checksum is seeded with the segment's own number, as frames of SQLite's
write-ahead log carry its salt: what lay on the disk before can't be taken for a record. Data is checked row by row, by
checksums that stand in the meta: a page can be read, and a flipped bit be named, without the rest. Checksums are XXH3
of 64 bits, 29 GB/s on one core of the machine that this was written on. They find accidents; against malice they prove
nothing.
This module knows no files: it is given what reads.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

FORMAT = 2
"""Of the records. 1 were the blobs of `legacy.py`."""
MAGIC = b"LSJ2"
ALIGNED = 64
"""Bytes; every part of a record begins at a multiple of it, so that any number type can be read in place."""
HEAD, ROWS, COMMIT = 1, 2, 3
"""Kinds: what a segment follows; rows of one stream; a commit of all rows before it."""

_HEADER = struct.Struct("<4sHHIIQQQ16xQ")
_COUNT = struct.Struct("<I")
_AHEAD = 4096  # bytes read together where a record begins: header and, mostly, meta

Read = Callable[[int, int], bytes]
"""Returns so many bytes from an offset on, fewer where the file ends: `read(count, offset)`."""


class BrokenError(Exception):
    """No whole record begins at a byte; the message says why."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class LaterError(Exception):
    """A whole record of a later version of the format."""


@dataclass(frozen=True)
class Record:
    """One record: where it begins, what it says of itself, and where its data lies."""

    kind: int
    at: int
    commit: int
    meta: bytes
    data_at: int
    data_bytes: int

    @property
    def end(self) -> int:
        """The byte at which the next record begins."""
        return self.data_at + padded(self.data_bytes)


@dataclass(frozen=True)
class RowsMeta:
    """What a record of rows holds: rows `numbers` of a stream, `sizes` bytes each, with their checksums."""

    stream: tuple[str, ...]
    numbers: Sequence[int]
    sizes: Sequence[int]
    checksums: Sequence[int]


def checksum(data: bytes | memoryview) -> int:
    """Return the checksum of bytes."""
    return int(xxhash.xxh3_64_intdigest(data))


def checksum_of(parts: Sequence[memoryview]) -> int:
    """Return the checksum of bytes that lie in several places."""
    if len(parts) == 1:
        return checksum(parts[0])
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return int(digest.intdigest())


def padded(count: int) -> int:
    """Return so many bytes and the zeros behind them."""
    return -(-count // ALIGNED) * ALIGNED


def padding(count: int) -> bytes:
    """Return the zeros that follow so many bytes."""
    return bytes(padded(count) - count)


def encode(kind: int, commit: int, meta: bytes, data_bytes: int, salt: int) -> bytes:
    """Return a record up to its data, which follows with zeros behind it."""
    whole = _HEADER.pack(MAGIC, kind, FORMAT, len(meta), 0, data_bytes, commit, checksum(meta), 0)[:-8]
    return whole + xxhash.xxh3_64_intdigest(whole, salt).to_bytes(8, "little") + meta + padding(len(meta))


def decode(read: Read, at: int, salt: int | None) -> Record:
    """Return the record that begins at a byte; its data is not looked at.

    Args:
        read: of the file.
        at: byte.
        salt: the segment's number; None: it is not known yet, and the record, the first, tells it.

    Raises:
        BrokenError: none begins there.
        LaterError: it is of a later format.
    """
    raw = read(_AHEAD, at)
    if len(raw) < _HEADER.size:
        raise BrokenError(at, "is cut short")
    magic, kind, version, meta_bytes, _, data_bytes, commit, meta_sum, header_sum = _HEADER.unpack_from(raw)
    meta_at = at + _HEADER.size
    if salt is None:
        # The first record tells the salt in its meta, which its own checksum covers.
        meta = raw[_HEADER.size : _HEADER.size + meta_bytes]
        salt = _salt_of(meta) if magic == MAGIC and checksum(meta) == meta_sum else 0
    if magic != MAGIC or xxhash.xxh3_64_intdigest(raw[: _HEADER.size - 8], salt) != header_sum:
        raise BrokenError(at, "fails its checksum")
    if version > FORMAT:
        raise LaterError(f"has format {version}, and this version reads up to {FORMAT}")
    meta = raw[_HEADER.size : _HEADER.size + meta_bytes]
    if len(meta) < meta_bytes:
        meta = read(meta_bytes, meta_at)
    if len(meta) < meta_bytes:
        raise BrokenError(at, "is cut short")
    if checksum(meta) != meta_sum:
        raise BrokenError(at, "fails its checksum")
    return Record(kind, at, commit, meta, meta_at + padded(meta_bytes), data_bytes)


def scan(read: Read, start: int, stop: int, salt: int) -> Iterator[Record]:
    """Yield the records from a byte on, up to another (errors: as `decode`, BrokenError for one that goes beyond)."""
    while start < stop:
        record = decode(read, start, salt)
        if record.end > stop:
            raise BrokenError(start, "is cut short")
        yield record
        start = record.end


def encode_head(salt: int, before: Sequence[tuple[str, int]]) -> bytes:
    """Return the first record of a segment: its number, and the segments that it follows with how much of each."""
    meta = json.dumps({"salt": f"{salt:016x}", "before": [[file, stop] for file, stop in before]}).encode()
    return encode(HEAD, 0, meta, 0, salt)


def decode_head(record: Record) -> tuple[int, list[tuple[str, int]]]:
    """Return a segment's number, and what it follows (BrokenError: it is no such record)."""
    try:
        told = json.loads(record.meta)
        return int(told["salt"], 16), [(str(file), int(stop)) for file, stop in told["before"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenError(record.at, "is not a segment's head") from error


def encode_rows(rows: RowsMeta) -> bytes:
    """Return the meta of a record of rows."""
    same = len(set(rows.sizes)) == 1
    told = {
        "stream": rows.stream,
        "rows": ranges(rows.numbers),
        "bytes": rows.sizes[0] if same else list(rows.sizes),
    }
    text = json.dumps(told, separators=(",", ":")).encode()
    sums = b"".join(each.to_bytes(8, "little") for each in rows.checksums)
    return _COUNT.pack(len(text)) + text + sums


def decode_rows(record: Record) -> RowsMeta:
    """Return what a record of rows holds (BrokenError: it is none)."""
    try:
        (count,) = _COUNT.unpack_from(record.meta)
        told: Any = json.loads(record.meta[_COUNT.size : _COUNT.size + count])
        numbers = numbers_of(told["rows"])
        sizes = told["bytes"] if isinstance(told["bytes"], list) else [told["bytes"]] * len(numbers)
        sums = struct.unpack_from(f"<{len(numbers)}Q", record.meta, _COUNT.size + count)
        if len(sizes) != len(numbers) or sum(sizes) != record.data_bytes:
            raise ValueError("sizes")
        return RowsMeta(tuple(str(part) for part in told["stream"]), numbers, sizes, sums)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise BrokenError(record.at, "holds no rows") from error


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: `0-99,120`."""
    parts: list[str] = []
    i = 0
    while i < len(numbers):
        j = i
        while j + 1 < len(numbers) and numbers[j + 1] == numbers[j] + 1:
            j += 1
        parts.append(f"{numbers[i]}-{numbers[j]}" if j > i else f"{numbers[i]}")
        i = j + 1
    return ",".join(parts)


def numbers_of(text: str) -> list[int]:
    """Return the numbers of such a text (ValueError: it is none)."""
    numbers: list[int] = []
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _salt_of(meta: bytes) -> int:
    try:
        return int(json.loads(meta)["salt"], 16)
    except (ValueError, KeyError, TypeError):
        return 0
