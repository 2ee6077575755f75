"""One row of the result: sides are prepared and checked one by one, then timed in turns.

A side that can't be measured is left out and says why; a wrong one has no figure. It does not know lengths or files.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longspan.bench import timing
from longspan.bench.attention import checks, floors
from longspan.bench.attention.inputs import Inputs
from longspan.bench.attention.sides import Side
from longspan.bench.attention.truth import Row
from longspan.bench.timing import Call, Peaks
from longspan.errors import LongspanError

WHATS = ("decode", "prefill", "backward")
_ROWS = 32
"""Sampled rows of a check of a chunk."""
_MOST_TURNS = 60
_DENSE_SECONDS = 1.0
"""Dense prefill gets fewer queries than the chunk has where it would take longer at the device's peak."""
_SHORT = 0.05
"""Seconds below which a call is timed behind another one, so that what the host takes to begin it does not count."""
_FEWEST = 1024
"""Queries that fill a GPU still: 256 tiles of 128 rows for 32 heads."""


@dataclass
class _Prepared:
    """A side that may be timed."""

    turn: Callable[[], Sequence[float]]
    """Takes one turn; the last of the seconds that it returns is the figure."""
    calls: float
    """How many of what is measured are in one turn: sets of a graph, or the share of a chunk's queries."""
    figures: dict[str, Any]


class Measured:
    """The sides of one row."""

    def __init__(self, what: str, sets: list[Inputs], peaks: Peaks, seed: int) -> None:
        """Begin a row.

        Args:
            what: one of `WHATS`.
            sets: inputs; decode reads one after another, the others take the first.
            peaks: of this device, in this run.
            seed: of the rows that are checked.
        """
        self.sets, self.peaks, self.seed = sets, peaks, seed
        self.device = sets[0].q.device
        self.what = what
        self._by = {"decode": self._decode, "prefill": self._prefill, "backward": self._backward}[what]
        self._prepared: dict[str, _Prepared] = {}
        self._skipped: dict[str, dict[str, Any]] = {}
        self._order: list[str] = []

    def prepare(self, side: Side, *, must: bool) -> None:
        """Check a side and make it ready, or note why it is left out.

        Args:
            side: what is measured.
            must: whether whatever stops it stops the run.

        Raises:
            WrongOutputError: its results are wrong, and it must be measured.
        """
        self._order.append(side.name)
        reason = side.missing(self.what, self.sets[0])
        if reason is None:
            try:
                self._prepared[side.name] = self._by(side)
                return
            except Exception as error:  # a peer's failure is a finding, whatever it is
                if must:
                    raise
                reason = str(error) if isinstance(error, LongspanError) else f"{type(error).__name__}: {error}"
        self._skipped[side.name] = {"skipped": " ".join(reason.split())[:300]}
        clean(self.device)

    def time(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Let the sides take turns, each for so many seconds in all; return figures by side, in their first order."""
        turns = timing.in_turns({name: one.turn for name, one in self._prepared.items()}, seconds, _MOST_TURNS)
        found = dict(self._skipped)
        for name, values in turns.items():
            one = self._prepared[name]
            middle, low, high = (value / one.calls for value in timing.spread([turn[-1] for turn in values]))
            found[name] = {"seconds": middle, "low": low, "high": high, "turns": len(values), **one.figures}
            if self.what == "backward":
                found[name]["forward_seconds"] = timing.spread([turn[0] for turn in values])[0]
            else:
                floor = one.figures["floor"]
                found[name]["share_of_bandwidth"] = floor["bytes"] / middle / self.peaks.copy_bytes_per_s
                found[name]["share_of_matmul"] = floor["flops"] / middle / self.peaks.matmul_flops
        return {name: found[name] for name in self._order}

    def _decode(self, side: Side) -> _Prepared:
        calls = [side.decode(one) for one in self.sets]
        with torch.no_grad():
            calls[0]()  # compiles
            extra, _ = _with_memory(calls[0], self.device)
            graph = side.graphs(self.device)
            if graph:
                replay, outs = timing.captured(calls)
                for out in outs:
                    out.fill_(float("nan"))
                replay()
            else:
                outs = [call() for call in calls]
        found = checks.Checked(0.0, 0, 0)
        for i in sorted({0, 1, len(outs) - 1} & set(range(len(outs)))):
            # Every head of the first set, a few of others.
            count = self.sets[i].q.shape[1]
            heads = range(i % count, count, 1 if i == 0 else 8)
            found += checks.outputs(side, self.sets[i], outs[i], [Row(head, 0) for head in heads])
        for out in outs:
            checks.finite(side, out)

        def every() -> None:
            with torch.no_grad():
                for call in calls:
                    call()

        return _Prepared(
            lambda: (timing.timed(replay if graph else every, self.device, ahead=graph),),
            len(calls),
            self._figures(side, 1, found) | {"extra_bytes": extra, "graph": graph},
        )

    def _prefill(self, side: Side) -> _Prepared:
        given = self._affordable(side)
        queries = given.q.shape[2]
        call = side.prefill(given)
        checks.poison(given)
        with torch.no_grad():
            found = checks.outputs(side, given, call(), checks.rows_of(given.q.shape[1], queries, _ROWS, self.seed))
        figures = self._figures(side, queries, found)

        last = math.inf

        def turn() -> Sequence[float]:
            nonlocal last
            with torch.no_grad():
                figures["extra_bytes"], last = _with_memory(call, self.device, ahead=last < _SHORT)
            return (last,)

        return _Prepared(turn, queries / self.sets[0].q.shape[2], figures)

    def _backward(self, side: Side) -> _Prepared:
        given = self.sets[0]
        rows = checks.rows_of(given.q.shape[1], given.q.shape[2], _ROWS, self.seed)
        found = checks.gradients(side, given, rows, self.seed)
        leaves = checks.leaves_of(given)
        call, of, upstream = side.prefill(leaves), (leaves.q, leaves.k, leaves.v), torch.randn_like(given.q)

        def turn() -> Sequence[float]:
            outs: list[torch.Tensor] = []
            forward = timing.timed(lambda: outs.append(call()), self.device)
            return forward, timing.timed(lambda: torch.autograd.grad(outs[0], of, upstream), self.device)

        return _Prepared(turn, 1, {"queries": given.q.shape[2], "dense": side.dense, **asdict(found)})

    def _affordable(self, side: Side) -> Inputs:
        """Return the inputs, with fewer queries where a dense side would take seconds over them."""
        given = self.sets[0]
        queries = given.q.shape[2]
        while (
            side.dense
            and queries >= 2 * _FEWEST
            and floors.of(side.truth, given).flops / self.peaks.matmul_flops > _DENSE_SECONDS
        ):
            queries //= 2
            given = given.newest(queries)
        return given

    def _figures(self, side: Side, queries: int, found: checks.Checked) -> dict[str, Any]:
        """Return what is known of a side before it is timed; `queries` that is less than the chunk's was scaled."""
        floor = floors.of(side.truth, self.sets[0])
        return {
            "queries": queries,
            "dense": side.dense,
            **asdict(found),
            "floor": {**asdict(floor), "seconds": floor.seconds(self.peaks)},
        }


def _with_memory(call: Call, device: torch.device, *, ahead: bool = False) -> tuple[int | None, float]:
    """Return the bytes that a call takes beyond inputs and output (None: the device does not tell), and its seconds."""
    if device.type != "cuda":
        return None, timing.timed(call, device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outs: list[torch.Tensor] = []

    def kept() -> None:
        outs.clear()
        outs.append(call())

    seconds = timing.timed(kept, device, ahead=ahead)
    output = outs[0].numel() * outs[0].element_size()
    return int(torch.cuda.max_memory_allocated() - before - output), seconds


def clean(device: torch.device) -> None:
    """Give freed memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
