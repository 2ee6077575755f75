"""Which tokens a session begins with, as a chain of hashes a page: equal hashes mean equal tokens from the first on.

A page's hash is taken over the hash before it and the page's tokens, as vLLM does for its blocks; the first over the
identity of what read them (model, tokenizer, attention, formats). A table of hashes then tells for any request which
session begins as it does, and for how long. Hashes are XXH3 of 128 bits: collisions are out of reach of accident, and
what is found is compared token by token before it is used.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence

import xxhash

from longspan.sessions.manifest import JSON
from longspan.sessions.rows import Piece

PAGE = 64
"""Tokens a hash; those of a page of keys and values."""
SIZE = 16
"""Bytes of a hash."""
_TOGETHER = 256  # hashes that are one row of a journal
STREAM = ("prefix", "", "")


def chain(identity: Mapping[str, JSON], tokens: Sequence[int]) -> list[bytes]:
    """Return the hash of every full page of tokens, read by what has this identity."""
    held = array("i", tokens).tobytes()  # 4 bytes a token, in the machine's order: chains are of one machine
    step = PAGE * array("i").itemsize
    digest = xxhash.xxh3_128_digest(json.dumps(identity, sort_keys=True).encode())
    found = []
    for start in range(0, len(tokens) // PAGE * step, step):
        digest = xxhash.xxh3_128_digest(digest + held[start : start + step])
        found.append(digest)
    return found


class ChainSource:
    """A chain on its way to a journal."""

    def __init__(self, hashes: Sequence[bytes]) -> None:
        """Take the hashes."""
        self.stream: tuple[str, ...] = STREAM
        self._data = b"".join(hashes)
        self.numbers: Sequence[int] = range(-(-len(hashes) // _TOGETHER))

    @property
    def nbytes(self) -> int:
        """Bytes of all hashes."""
        return len(self._data)

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows."""
        each = _TOGETHER * SIZE
        sizes = [min(each, len(self._data) - at) for at in range(0, len(self._data), each)]
        if sizes:
            yield Piece(0, memoryview(self._data), sizes)


def rows(pages: int) -> list[int]:
    """Return the numbers of the rows that hold so many hashes."""
    return list(range(-(-pages // _TOGETHER)))


def hashes_of(data: bytes) -> list[bytes]:
    """Return the hashes that a journal held."""
    return [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
