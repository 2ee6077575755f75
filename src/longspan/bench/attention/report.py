"""A result of `longspan bench attention` as one JSON value, and as a table for people.

Beside the rows: how each side's time grows with the context (the exponent of a power law), and from which length on we
are faster than each other side, and than the fastest dense one. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from longspan.bench.attention.measure import WHATS
from longspan.bench.attention.sides import OURS
from longspan.bench.journaled import one_result
from longspan.bench.scaling import crossover, exponent
from longspan.evals.journal import Entry

COLUMNS = (
    "part", ">context", "side", ">time", ">/ ours", ">floor", ">bandwidth", ">matmul", ">extra", ">error"
)  # fmt: skip
"""Titles of the table; a title that begins with > stands over numbers.

The floor is the time that the device's peaks leave for the least bytes and FLOPs; bandwidth and matmul are the shares
of these peaks that the least bytes and FLOPs reach in the time measured.
"""


FASTEST = "fastest dense"


def result(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return environment, what was measured (`of`), rows in order of part and length, and how they scale.

    Of two rows of one part and length the later one stands.

    Raises:
        UsageError: no row, or rows of different tasks or devices, which must not stand side by side.
    """
    made = one_result(
        entries, lambda row: (row["what"], row["length"]), lambda row: (WHATS.index(row["what"]), row["length"])
    )
    return {**made, "scaling": scaling(made["rows"])}


def scaling(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line a part and side: exponent of its time, and from which length on ours is faster.

    Where several sides are dense, a line `fastest dense` stands for the best of them at each length.
    """
    lines = []
    for what in WHATS:
        own = [row for row in rows if row["what"] == what]
        times = times_of(own)
        ours = times.get(OURS, {})
        dense = {name for row in own for name, each in row["sides"].items() if name != OURS and each.get("dense")}
        if len(dense) > 1:
            lengths = sorted({length for name in dense for length in times[name]})
            times[FASTEST] = {
                length: min(times[name][length] for name in dense if length in times[name]) for length in lengths
            }
        for name, seconds in times.items():
            slope = exponent(seconds)
            line = {"what": what, "side": name, "exponent": slope and round(slope, 4), "lengths": [*seconds]}
            lines.append(line if name == OURS else {**line, "ours_faster_from": crossover(ours, seconds)})
    return lines


def times_of(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return seconds by side and length."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, figures in row["sides"].items():
            if "seconds" in figures:
                found.setdefault(name, {})[row["length"]] = figures["seconds"]
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a line of text a row and side that was measured, in the order of `COLUMNS`."""
    return [_line(row, name) for row in rows for name, figures in row["sides"].items() if "seconds" in figures]


def _line(row: dict[str, Any], name: str) -> list[str]:
    figures = row["sides"][name]
    seconds = figures["seconds"]
    floor, extra = figures.get("floor"), figures.get("extra_bytes")
    return [
        row["what"],
        words(row["length"]),
        name,
        duration(seconds) + ("*" if figures["queries"] < row["queries"] else ""),
        "" if name == OURS else f"{row['ratios'][name]:.2f}x",
        "" if floor is None else duration(floor["seconds"]),
        "" if floor is None else f"{figures['share_of_bandwidth']:.0%}",
        "" if floor is None else f"{figures['share_of_matmul']:.0%}",
        "" if extra is None else f"{extra / 2**20:,.0f} MiB",
        f"{figures['error']:.0e}",
    ]


def sentences(result: dict[str, Any]) -> list[str]:
    """Return what follows from the rows, a line each: exponents, crossovers, what was scaled or left out."""
    said = []
    for line in result["scaling"]:
        parts = [] if line["exponent"] is None else [f"grows as n^{line['exponent']:.2f}"]
        if (faster := line.get("ours_faster_from")) is not None:
            at, found = faster["length"], {"always": "at every context measured", "never": "at no context measured"}
            where = found[faster["faster"]] if at is None else f"from about {at:,} tokens on"
            parts.append(f"ours is faster {where}")
        if parts:
            said.append(f"{line['what']}: {line['side']} {'; '.join(parts)}")
    if any(
        each.get("queries", row["queries"]) < row["queries"] for row in result["rows"] for each in row["sides"].values()
    ):
        said.append("* measured with the newest queries of the chunk, and scaled to all of them")
    for row in result["rows"]:
        left_out = {name: each["skipped"] for name, each in row["sides"].items() if "skipped" in each}
        said += [f"{row['what']}: {name} is left out: {reason}" for name, reason in left_out.items()]
    return list(dict.fromkeys(said))


def duration(seconds: float) -> str:
    """Return a time for people, with three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def words(length: int) -> str:
    """Return a length as people write it: `64K`, `1M`."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)
