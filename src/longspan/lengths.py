"""Lengths in tokens and sizes in bytes as people write them: `8192`, `16K`, `1M`, `1.5M`, `128Ki`; `8GiB`; `12h`.

It does not know what a length is good for: whether a model's window holds it is not asked here.
"""

from __future__ import annotations

import re
from decimal import Decimal

from longspan.errors import UsageError

_UNITS = {"K": 1024, "M": 1024 * 1024}
_MEASURED = 1024 * _UNITS["M"]
"""Tokens of a context beyond which nothing is measured: no machine's memory holds its text and its tokens."""


def tokens_of(text: str) -> int:
    """Read a length such as `16K` or `1M` (UsageError: it is none)."""
    written = text.strip()
    unit = _UNITS.get(written[-1:].upper())
    number = written[:-1] if unit else written
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"{text!r} is no length: write 8192, 8K or 1M")
    if (tokens := int(number) * (unit or 1)) > _MEASURED:
        raise UsageError(f"{text!r} is more than can be measured: give at most {_MEASURED // _UNITS['M']:,}M tokens")
    return tokens


def lengths_of(text: str) -> list[int]:
    """Read lengths that stand between commas, each of them once, in their order."""
    return list(dict.fromkeys(map(tokens_of, text.split(","))))


_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_CONTEXT = re.compile(r"([0-9]+(?:[_,][0-9]{3})*(?:\.[0-9]+)?)\s*([KMG]I?)?", re.ASCII | re.IGNORECASE)
_LONGEST = 10**12
"""Tokens of a context that anybody may plan for."""


def context_of(text: str) -> int:
    """Read a planned context in decimal units, such as `1.5M` (1,500,000) or `128K`, or binary ones, such as `128Ki`.

    The planner counts as papers and prices do; lengths that are measured (`tokens_of`) are powers of two.

    Raises:
        UsageError: it is none, or no whole number of tokens.
    """
    found = _CONTEXT.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no context: write 1.5M, 128K (128,000 tokens) or 128Ki (131,072)")
    number, unit = found.groups(default="")
    tokens = Decimal(re.sub("[_,]", "", number)) * _SCALES[unit.upper()]
    if tokens != tokens.to_integral_value() or not 1 <= tokens <= _LONGEST:
        raise UsageError(f"{text!r} is {tokens.normalize():f} tokens: give a whole number from 1 to {_LONGEST:,}")
    return int(tokens)


def short(tokens: int) -> str:
    """Return a context as it is written: `1.5M`, `128Ki`, `131`; `context_of` reads it."""
    for unit in ("GI", "MI", "KI"):
        # A power of two is told as one, unless it is as round in decimal units.
        if tokens % _SCALES[unit] == 0 and tokens % 1000:
            return f"{tokens // _SCALES[unit]}{unit[0]}i"
    for unit in ("G", "M", "K"):
        if tokens >= _SCALES[unit] and tokens * 1000 % _SCALES[unit] == 0:
            return f"{Decimal(tokens) / _SCALES[unit]:f}{unit}"
    return str(tokens)


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


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Read a time such as 90s, 12h or 7d in seconds (UsageError: it is none)."""
    number, unit = text[:-1], _SECONDS.get(text[-1:])
    try:
        seconds = float(number) * unit if unit else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{text!r} is no time: write 90s, 30m, 12h or 7d")
    return seconds
