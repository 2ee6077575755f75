"""Times calls on a CPU or a GPU, and what the device can do at best: bytes and FLOPs a second, measured.

On a GPU a call is timed between two events, so that what the host does meanwhile does not count; decode steps are
captured in a CUDA graph first. Sides that are compared take turns, so that a device that slows down slows each.
It does not know what is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]
"""What is timed: prepared, without arguments."""

_COPY_BYTES = {"cuda": 2 << 30, "cpu": 64 << 20}
_MATMUL = {"cuda": 8192, "cpu": 512}
_LEAST_TURNS = 5
"""Turns of every side, unless one takes longer than the time that it has in all."""


@dataclass(frozen=True)
class Peaks:
    """What a device reaches with work that does nothing else."""

    copy_bytes_per_s: float
    """Of a large copy, counting bytes read and bytes written."""
    matmul_flops: float
    """Of a large square product in the number type that is measured."""


def timed(call: Callable[[], object], device: torch.device, *, ahead: bool = False) -> float:
    """Return the seconds that one call takes on its device.

    Args:
        call: what is timed.
        device: where it computes.
        ahead: on a GPU, call it once before it counts: the device then still works while the host begins the call that
            counts, as it does in a model's next layer.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def in_turns(
    calls: Mapping[str, Callable[[], Sequence[float]]], seconds: float, most: int
) -> dict[str, list[Sequence[float]]]:
    """Let sides take turns until each has had its time; return what each of their calls measured.

    Args:
        calls: by side, what measures one turn and returns seconds; the first of them decide how long it goes on.
        seconds: that a side has in all. One turn is always taken, and `_LEAST_TURNS` if they take less than twice that.
        most: turns of a side.
    """
    found: dict[str, list[Sequence[float]]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    while True:
        waiting = [
            name for name in calls if len(found[name]) < most and _goes_on(len(found[name]), spent, name, seconds)
        ]
        if not waiting:
            return found
        for name in waiting:
            turn = calls[name]()
            found[name].append(turn)
            spent[name] += sum(turn)


def _goes_on(turns: int, spent: Mapping[str, float], name: str, seconds: float) -> bool:
    allowed = 2 * seconds if turns < _LEAST_TURNS else seconds
    return turns == 0 or spent[name] * (turns + 1) / turns <= allowed


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, lower and upper quartile (all alike for one value)."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def captured(calls: Sequence[Call], *, mode: str = "global") -> tuple[Callable[[], None], list[Tensor]]:
    """Capture calls, one after another, in a CUDA graph; return what replays it and the tensors that it writes.

    Args:
        calls: what is captured.
        mode: which threads may not touch the device meanwhile; `thread_local` where NCCL's own watch the ranks.

    Raises:
        RuntimeError: a call waits for the device or can't be captured for another reason.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated on first use must not be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        outs = [call() for call in calls]
    return graph.replay, outs


def peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Measure what a device reaches (takes about a second)."""
    size, side = _COPY_BYTES[device.type], _MATMUL[device.type]
    return Peaks(
        copy_bytes_per_s=2 * size / _copy_seconds(size, device),
        matmul_flops=2 * side**3 / _matmul_seconds(side, device, dtype),
    )


def _copy_seconds(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _usual(lambda: target.copy_(source), device)


def _matmul_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    # Random numbers: a product of zeros takes less power, and runs faster than any real one.
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return _usual(lambda: a @ b, device)


def _usual(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(timed(call, device) for _ in range(20))
