"""Measures one attention layer at growing contexts: our mechanism beside peers, in one run, outputs checked first.

At each length, decode (one query) and prefill (a chunk of queries at the context's end) as asked, and backward of
that chunk. Sides take turns. Decode steps are captured in a CUDA graph, one step for each of several sets of inputs,
so that no cache still holds what a step reads. Dense prefill that would take seconds is measured with fewer queries
and scaled, and says so. Every row of the result goes into a journal as it comes.

It measures one layer with everything in memory: no projections, no rotation, no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from longspan.attention import Mechanism
from longspan.bench import timing
from longspan.bench.attention import inputs, sides, truth
from longspan.bench.attention.measure import WHATS, Measured, clean
from longspan.bench.attention.report import duration
from longspan.bench.timing import Peaks
from longspan.errors import UsageError
from longspan.evals.journal import Entry, Journal

_STEPS = 16
"""Decode steps in one graph, each with queries of its own: what it takes to launch a graph is shared by all of them."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    mechanism: Mechanism
    peers: tuple[str, ...]
    lengths: tuple[int, ...]
    whats: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    chunk: int
    routing: str
    seed: int
    seconds: float
    """Of measuring that each side gets for each row."""
    device: torch.device
    dtype: torch.dtype
    where: str
    """The device's name: rows of two devices never stand side by side."""

    def __post_init__(self) -> None:
        """Refuse what can't be measured (UsageError)."""
        truth.checked(self.mechanism)
        for name, given, known in (("peer", self.peers, sides.PEERS), ("part", self.whats, WHATS)):
            for one in given:
                if one not in known:
                    raise UsageError(f"unknown {name} {one!r}: use {', '.join(known)}")
        if not self.whats:
            raise UsageError(f"no part is named: give --what one of {', '.join(WHATS)}")
        if self.routing not in inputs.ROUTINGS:
            raise UsageError(f"unknown routing {self.routing!r}: use {' or '.join(inputs.ROUTINGS)}")
        if min(self.heads, self.kv_heads, self.head_dim, self.chunk) < 1 or self.heads % self.kv_heads:
            raise UsageError("--heads must be a multiple of --kv-heads, --head-dim and --chunk at least 1")
        if not self.seconds > 0:
            raise UsageError(f"--seconds {self.seconds:g} measures nothing: give more than 0")
        for length in self.lengths:
            if length % 64:
                raise UsageError(f"{length} tokens are no whole number of pages: give a multiple of 64")

    @property
    def shape(self) -> inputs.Shape:
        """The layer."""
        window = getattr(self.mechanism, "whole_window", 0)
        return inputs.Shape(self.heads, self.kv_heads, self.head_dim, self.dtype, self.device, window)

    @property
    def of(self) -> dict[str, Any]:
        """What rows must have in common to stand in one result."""
        return {
            "mechanism": self.mechanism.describe(),
            "peers": list(self.peers),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "chunk": self.chunk,
            "routing": self.routing,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.where,
        }


def run(
    asked: Asked,
    journal: Journal,
    late: Callable[[], bool],
    say: Callable[[str], None],
    busy: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Measure what the journal does not hold yet; return what was left out because time was up.

    Args:
        asked: what.
        journal: begun; every row goes into it as it comes.
        late: whether no further row may be begun.
        say: told every figure.
        busy: told what is being done.

    Raises:
        WrongOutputError: our own output is wrong.
    """
    done = {(entry.row["what"], entry.row["length"]) for entry in entries_of(asked, journal)}
    device_peaks: Peaks | None = None
    left: list[str] = []
    for length in asked.lengths:
        for what in (what for what in WHATS if what in asked.whats):
            if (what, length) in done:
                continue
            if late():
                left.append(f"{what} at {length:,}")
                continue
            if device_peaks is None:
                device_peaks = timing.peaks(asked.device, asked.dtype)
            journal.append({**_row(asked, what, length, device_peaks, say, busy), "of": asked.of})
            clean(asked.device)
    return left


def entries_of(asked: Asked, journal: Journal) -> list[Entry]:
    """Return what of a journal answers what is asked."""
    return [
        entry
        for entry in journal.entries
        if entry.row.get("of") == asked.of and entry.row["length"] in asked.lengths and entry.row["what"] in asked.whats
    ]


def _row(
    asked: Asked,
    what: str,
    length: int,
    device_peaks: Peaks,
    say: Callable[[str], None],
    busy: Callable[[str], None],
) -> dict[str, Any]:
    queries = 1 if what == "decode" else min(asked.chunk, length)
    count = _STEPS if what == "decode" else 1
    sets = inputs.make(asked.shape, length, queries, asked.routing, asked.seed, count)
    measured = Measured(what, sets, device_peaks, asked.seed)
    for side in sides.of(asked.mechanism, asked.peers, asked.device):
        busy(f"{what} at {length:,}: checking {side.name}")
        measured.prepare(side, must=side.name == sides.OURS)
    busy(f"{what} at {length:,}: timing")
    found = measured.time(asked.seconds)
    for name, figures in found.items():
        shown = duration(figures["seconds"]) if "seconds" in figures else f"left out: {figures['skipped']}"
        say(f"{what} at {length:,}: {name} {shown}")
    ours = found[sides.OURS]["seconds"]
    times = {name: figures["seconds"] for name, figures in found.items() if "seconds" in figures and name != sides.OURS}
    row = {
        "what": what,
        "length": length,
        "queries": queries,
        "sets": count,
        "sides": found,
        "ratios": {name: seconds / ours for name, seconds in times.items()},
        "peaks": asdict(device_peaks),
    }
    return {key: _short(value) for key, value in row.items()}


def _short(value: Any) -> Any:
    """Return a JSON value with five digits of every fraction: more than any clock gives."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def versions(device: torch.device) -> dict[str, str | None]:
    """Return the versions of what kernels are made with; None where a device needs none or nothing is installed."""
    found: dict[str, str | None] = {}
    for package in ("triton", "superlinear"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    gpu = device.type == "cuda"
    return found | {
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": str(torch.backends.cudnn.version()) if gpu else None,
    }
