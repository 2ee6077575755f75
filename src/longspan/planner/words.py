"""Estimates in words: bytes, seconds, speeds and money, to no more digits than an estimate has."""

from __future__ import annotations

from longspan.planner.measured import Range


def size(count: float) -> str:
    """Return bytes in decimal units: `327.7 GB`, `2.62 TB`."""
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= 0.9995 * each:
            value = count / each
            return f"{value:.2f} {unit}" if unit == "TB" or abs(value) < 10 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Return a time: `3.2 ms`, `49 s`, `2.1 min`, `3.4 h`."""
    for unit, each in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= (1 if value == each else 2) * each:
            return f"{digits(value / each)} {unit}"
    if value >= 1:
        return f"{digits(value)} s"
    return f"{digits(1e3 * value)} ms" if value >= 1e-3 else f"{digits(1e6 * value)} us"


def digits(value: float) -> str:
    """Return a number to two digits, or all of its whole ones."""
    if value == 0:
        return "0"
    if value >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def between(low: str, high: str) -> str:
    """Return two ends in words; one where they are the same."""
    return low if low == high else f"{low} to {high}"


def time(given: Range) -> str:
    """Return a range of seconds."""
    low, high = seconds(given.low), seconds(given.high)
    unit = high.rpartition(" ")[2]
    # The unit once, where both have the same.
    return between(low.rpartition(" ")[0] if low.endswith(f" {unit}") and low != high else low, high)


def speed(low: float, high: float) -> str:
    """Return a range of tokens a second."""
    return f"{between(digits(low), digits(high))} tokens/s"


def money(value: float) -> str:
    """Return dollars: two digits behind the point, more where they would be nothing."""
    if value == 0:
        return "$0"
    return f"${value:,.0f}" if value >= 1000 else f"${value:,.2f}" if value >= 0.1 else f"${value:.2g}"
