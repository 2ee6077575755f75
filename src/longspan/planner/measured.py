"""What devices reached of their roofline in committed measurements, and how far that carries.

Rows come from `measured.json` (made by `python -m benchmarks.planner` from `benchmarks/results`). One layer's attention
gives efficiencies, the roofline's time over the measured one, by bytes read (decode) or context (prefill). An answer
is always a range, and names the rows that it rests on; where nothing was measured it says so and is wide.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longspan.planner import devices
from longspan.planner.devices import Device
from longspan.planner.memory import mechanism

_FILE = Path(__file__).with_name("measured.json")
_SAME, _CARRIED = 1.15, 1.4
"""By what factor a time may differ from what was measured: on this device, or on another GPU."""
_FUSED, _PLAIN = (0.3, 0.9), (0.02, 0.6)
"""Efficiencies where a mechanism was not measured: of dense attention, which runs in fused kernels anywhere, and of the
others, which are plain PyTorch at worst."""


class Source(NamedTuple):
    """What an estimate rests on: a row (from 0) of a file of results, or a reason why there is none."""

    file: str
    row: int
    note: str = ""


@dataclass(frozen=True)
class Range:
    """Two ends of something that is not known exactly, and what they rest on."""

    low: float
    high: float
    by: tuple[Source, ...] = ()

    @property
    def middle(self) -> float:
        """The geometric middle."""
        return math.sqrt(self.low * self.high)

    def over(self, seconds: float) -> Range:
        """Return the range of times of something that takes so many seconds at an efficiency of 1."""
        return Range(seconds / self.high, seconds / self.low, self.by)


def plus(*ranges: Range) -> Range:
    """Return the range of a sum."""
    by = tuple(dict.fromkeys(itertools.chain.from_iterable(each.by for each in ranges)))
    return Range(sum(each.low for each in ranges), sum(each.high for each in ranges), by)


@dataclass(frozen=True)
class Point:
    """One measured time, against the roofline's."""

    at: float
    efficiency: float
    by: tuple[Source, ...]


@functools.cache
def entries() -> dict[str, list[dict[str, Any]]]:
    """Return what was measured: `attention`, `models` and `evals`."""
    found: dict[str, list[dict[str, Any]]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def source(entry: dict[str, Any]) -> Source:
    """Return the file and row of an entry."""
    return Source(entry["file"], entry["row"])


def efficiency(device: Device, name: str, what: str, at: float) -> Range:
    """Return what share of the roofline a mechanism's attention reaches in one layer.

    Args:
        device: that computes.
        name: of the mechanism.
        what: `decode` or `prefill`.
        at: bytes that a decode step reads in the layer; tokens of context for prefill.
    """
    for own, spread in ((True, _SAME), (False, _CARRIED)):
        found = [
            _at(points, at)
            for (on, _), points in _series(name, what).items()
            if device.gpu and (on == device.name) is own
        ]
        if found:
            low, high = min(each.efficiency for each in found), max(each.efficiency for each in found)
            by = dict.fromkeys(itertools.chain.from_iterable(each.by for each in found))
            return Range(low / spread, min(1.0, high * spread), tuple(by if own else map(_carried, by)))
    low, high = _FUSED if mechanism(name).exact else _PLAIN
    why = Source("", 0, f"attention by {name} alone was not measured on {'a GPU' if device.gpu else 'a CPU'}")
    return Range(low, high, (why,))


def _carried(source: Source) -> Source:
    return source._replace(note="carried over from another device")


def summary(by: Iterable[Source]) -> list[str]:
    """Return sources in a few lines: a file with its rows in one, reasons as they are."""
    rows: dict[tuple[str, str], set[int]] = {}
    for each in by:
        rows.setdefault((each.file, each.note), set()).add(each.row)
    lines = []
    for (file, note), numbers in rows.items():
        if file:
            listed = ", ".join(map(str, sorted(numbers)))
            lines.append(f"{file} row{'s' if len(numbers) > 1 else ''} {listed}{f' ({note})' if note else ''}")
        else:
            lines.append(note)
    return lines


@functools.cache
def _series(name: str, what: str) -> dict[tuple[str, str], list[Point]]:
    """Return the points of a mechanism by device and kernel, in ascending order."""
    found: dict[tuple[str, str], list[Point]] = {}
    for entry in entries()["attention"]:
        if (entry["mechanism"].partition(":")[0], entry["what"]) != (name, what):
            continue
        device = devices.of(entry["device"])
        if device.gpu:
            at, seconds = _roofline(entry, device)
            point = Point(at, min(1.0, seconds / entry["seconds"]), (source(entry),))
            found.setdefault((device.name, entry["by"]), []).append(point)
    return {key: sorted(points, key=lambda point: point.at) for key, points in found.items()}


def _roofline(entry: dict[str, Any], device: Device) -> tuple[float, float]:
    """Return where an entry stands in its series, and the seconds that the device's peaks leave for it."""
    from longspan.attention import Shape

    chosen = mechanism(entry["mechanism"])
    shape = Shape(entry["heads"], entry["kv_heads"], entry["head_dim"], entry["head_dim"], 2.0)
    cost = chosen.cost(entry["length"], shape)
    if entry["what"] == "decode":
        return cost.decode_bytes, max(cost.decode_bytes / device.bandwidth, cost.decode_flops / device.peak("bf16"))
    before = entry["length"] - entry["queries"]
    flops = cost.prefill_flops - (chosen.cost(before, shape).prefill_flops if before else 0.0)
    return entry["length"], flops / device.peak("bf16")


def _at(points: Sequence[Point], at: float) -> Point:
    """Return the efficiency between two points, straight in logarithms; beyond the ends, that of the end."""
    after = next((i for i, point in enumerate(points) if point.at >= at), len(points))
    if after == 0 or after == len(points):
        return points[min(after, len(points) - 1)]
    a, b = points[after - 1], points[after]
    share = math.log(at / a.at) / math.log(b.at / a.at)
    return Point(at, a.efficiency * (b.efficiency / a.efficiency) ** share, tuple(dict.fromkeys(a.by + b.by)))
