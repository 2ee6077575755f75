"""Lengths in tokens and sizes in bytes as people write them: `8192`, `16K`, `1M`, `4K,16K`; `8GiB`, `500MB`.

It does not know what a length is good for: whether a model's window holds it is not asked here.
"""

from __future__ import annotations

from longspan.errors import UsageError

_UNITS = {"K": 1024, "M": 1024 * 1024}


def tokens_of(text: str) -> int:
    """Read a length such as `16K` or `1M` (UsageError: it is none)."""
    written = text.strip()
    unit = _UNITS.get(written[-1:].upper())
    number = written[:-1] if unit else written
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"{text!r} is no length: write 8192, 8K or 1M")
    return int(number) * (unit or 1)


def lengths_of(text: str) -> list[int]:
    """Read lengths that stand between commas, each of them once, in their order."""
    return list(dict.fromkeys(map(tokens_of, text.split(","))))


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(text: str) -> int:
    """Read a size such as `8GiB`, `1.5 GB` or `1000000` (UsageError: it is none)."""
    written = text.strip().upper()
    number = written.rstrip("BIKMGT ")
    unit = written[len(number) :].strip() or "B"
    try:
        size = int(float(number) * _BYTES[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(f"{text!r} is no size in bytes: write 8GiB, 500MB or 1000000")
    return size
