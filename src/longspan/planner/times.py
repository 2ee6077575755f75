"""Seconds of prefill and of a decode step, as ranges: a roofline of the device, corrected by what was measured.

What attention costs is the registry's; what weights and states cost is bytes over bandwidth and FLOPs over the peak.
Attention is corrected by measurements of one layer, the rest by those of whole models: a row leaves it open whether its
excess over the roofline is a share or so much a layer, so both are taken as ends of the range.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.errors import LongspanError
from longspan.planner import devices, formats, measured, reading
from longspan.planner.devices import Device
from longspan.planner.measured import Range, Source, plus
from longspan.planner.memory import CHUNK, GPU_CHUNK, attended, mechanism, state_bytes
from longspan.planner.model import Model

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_PIECES = 16
"""Pieces of a context over which prefill is summed, since what a device reaches changes with it."""
_NEAR, _SAME, _OTHER = 1.2, 1.35, 1.8
"""By what factor the rest may differ from what a whole model's row says: of the same model within a factor of 4 of the
context, of the same model, of another one."""
_DECODE, _PREFILL, _EXPERTS = (0.5, 0.92), (0.3, 0.8), (0.1, 0.65)
"""Shares of bandwidth and of FLOPs that products with weights reach on a GPU where no whole model was measured."""
_HOST = (5e-6, 400e-6)
"""Seconds a layer that the host adds to a decode step: in a CUDA graph, and with a model's Python modules."""


@dataclass(frozen=True)
class Work:
    """What is to be computed: one model, mechanism and context on one device."""

    model: Model
    n: int
    attention: str
    weights: str
    kv: str
    concurrent: int
    device: Device
    chunk: int

    @property
    def name(self) -> str:
        """The mechanism's name, without options."""
        return self.attention.partition(":")[0]

    @property
    def own(self) -> float:
        """Bytes of a number as the model computes."""
        return formats.own_bytes(self.weights)

    @property
    def peak(self) -> float:
        """FLOPs a second of products with weights."""
        return self.device.peak(formats.PRODUCTS.get(self.weights, "bf16"))

    @property
    def prefill_spec(self) -> str:
        """By what documents are read: what chooses in decode alone reads densely, beyond training by a window."""
        if mechanism(self.attention).prefills:
            return self.attention
        return "dense" if self.model.trained is None or self.n <= self.model.trained else "streaming"


def decode(work: Work) -> Range:
    """Return the seconds of one decode step, which gives a token of each concurrent context."""
    return _whole(work, "decode")


def prefill(work: Work) -> Range:
    """Return the seconds of reading one context."""
    return _whole(work, "prefill")


def decode_rest(work: Work) -> Range:
    """Return the seconds of a decode step without attention."""
    return _rest(work, "decode", _rows(work, "decode"))


def prefill_rest(work: Work) -> Range:
    """Return the seconds of reading a context without attention."""
    return _rest(work, "prefill", _rows(work, "prefill"))


def decode_roofline(work: Work) -> float:
    """Return the least seconds of a decode step without attention: weights, states and their products."""
    read = formats.read_bytes(work.model, work.weights, work.concurrent)
    read += 2 * work.concurrent * state_bytes(work.model, work.own)
    flops = 2.0 * work.concurrent * work.model.active
    return max(read / work.device.bandwidth, flops / work.peak)


def prefill_roofline(work: Work) -> float:
    """Return the least seconds of reading a context without attention."""
    layers = work.model.active - (work.model.head or work.model.vocabulary * work.model.hidden)
    flops = work.n * (2.0 * layers + sum(each.flops for each in work.model.recurrent))
    chunks = math.ceil(work.n / work.chunk)
    read = chunks * formats.read_bytes(work.model, work.weights, min(work.chunk, work.n))
    return max(read / work.device.bandwidth, flops / work.peak)


def decode_attention(work: Work) -> Range:
    """Return the seconds of attention in one decode step."""
    found = []
    numbers = "fp32" if work.weights == "fp32" else "bf16"
    for each in attended(work.model, work.attention, work.kv, work.own, work.n):
        name = work.attention if each.attention.window is None else "dense"
        cost, together = each.cost, work.concurrent * each.count
        seconds = max(
            cost.decode_bytes / work.device.bandwidth,
            cost.decode_flops * each.decode_share / work.device.peak(numbers),
        )
        reached = measured.efficiency(work.device, name.partition(":")[0], "decode", cost.decode_bytes)
        found.append(reached.over(together * seconds))
    return plus(*found)


def prefill_attention(work: Work) -> Range:
    """Return the seconds of attention in prefill, summed over pieces of the context."""
    found = []
    numbers = "fp32" if work.weights == "fp32" else "bf16"
    ends = sorted({max(1, round(work.n * 2.0 ** (-i / 2))) for i in range(_PIECES)})
    for start, stop in itertools.pairwise([0, *ends]):
        after = attended(work.model, work.prefill_spec, work.kv, work.own, stop)
        before = attended(work.model, work.prefill_spec, work.kv, work.own, start) if start else None
        for i, each in enumerate(after):
            name = work.prefill_spec if each.attention.window is None else "dense"
            flops = each.cost.prefill_flops - (before[i].cost.prefill_flops if before else 0.0)
            seconds = each.count * flops * each.prefill_share / work.device.peak(numbers)
            reached = measured.efficiency(work.device, name.partition(":")[0], "prefill", stop)
            found.append(reached.over(max(0.0, seconds)))
    return plus(*found)


def _whole(work: Work, what: str) -> Range:
    """Return the seconds of attention and of all the rest."""
    attention, roofline = _PARTS[what]
    rows = _rows(work, what)
    if not rows or not all(row.same for row, _ in rows):
        return plus(attention(work), _rest(work, what, rows))
    # The same was measured at another context nearby: only the way there is a matter of the model.
    here, ends = attention(work).middle + roofline(work), []
    for row, seconds in rows:
        there = attention(row.work).middle + roofline(row.work)
        ends.append((seconds * here / there, row.spread))
        if what == "decode":
            ends.append((max(seconds + here - there, 0.3 * seconds), row.spread))
    return _range(ends, [row for row, _ in rows])


def _range(ends: Sequence[tuple[float, float]], rows: Sequence[_Row]) -> Range:
    """Return the range of several estimates, each with the factor by which it may be wrong."""
    low, high = min(end / spread for end, spread in ends), max(end * spread for end, spread in ends)
    return Range(low, high, tuple(row.by for row in rows))


def _rest(work: Work, what: str, rows: Sequence[tuple[_Row, float]]) -> Range:
    """Return the seconds of everything but attention, corrected by whole models where there are any."""
    attention, roofline = _PARTS[what]
    least = roofline(work)
    if not rows:
        return _unmeasured(work, what, least)
    ends = []
    for row, seconds in rows:
        rest, floor = max(seconds - attention(row.work).middle, 0.1 * seconds), roofline(row.work)
        ends.append((least * rest / floor, row.spread))
        if what == "decode":  # the excess may as well be so much a layer
            added = least + (rest - floor) * len(work.model.layers) / len(row.work.model.layers)
            ends.append((max(added, 0.3 * least), row.spread))
    return _range(ends, [row for row, _ in rows])


_PARTS: dict[str, tuple[Callable[[Work], Range], Callable[[Work], float]]] = {
    "decode": (decode_attention, decode_roofline),
    "prefill": (prefill_attention, prefill_roofline),
}
"""What is computed, and its least without attention, of each half of the work."""


def _unmeasured(work: Work, what: str, least: float) -> Range:
    """Return the range of all but attention where no whole model was measured on such a device."""
    told = (Source("", 0, f"no whole model was measured on {work.device.name}: the rest is its roofline alone"),)
    if not work.device.gpu:
        return Range(least, 10 * least, told)
    if what == "decode":
        layers = len(work.model.layers)
        return Range(least / _DECODE[1] + layers * _HOST[0], least / _DECODE[0] + layers * _HOST[1], told)
    low, high = _EXPERTS if any(layer.experts for layer in work.model.layers) else _PREFILL
    return Range(least / high, least / low, told)


@dataclass(frozen=True)
class _Row:
    """A measured run of a whole model."""

    work: Work
    by: Source
    spread: float
    same: bool
    """Whether it is of the same model and mechanism, at a context within a factor of 4."""


def _rows(work: Work, what: str) -> list[tuple[_Row, float]]:
    """Return the rows of whole models that say most of this work, with their seconds.

    Of the same mechanism if there are any, else of dense attention; of the same model, else of the one that is nearest
    in parameters; and of these the nearest contexts on both sides.
    """
    found = [row for entry in measured.entries()["models"] if (row := _row(work, what, entry))]
    for wanted in (work.name, "dense"):
        same = [row for row in found if row[0].work.name == wanted]
        if same:
            break
    else:
        return []
    nearest = min(same, key=lambda row: _distance(row[0].work.model, work.model))[0].work.model.name
    same = [row for row in same if row[0].work.model.name == nearest]
    below = [row for row in same if row[0].work.n <= work.n]
    above = [row for row in same if row[0].work.n > work.n]
    chosen = [max(below, key=lambda row: row[0].work.n)] if below else []
    if above and not (chosen and chosen[0][0].work.n == work.n):
        chosen.append(min(above, key=lambda row: row[0].work.n))
    return chosen


def _distance(a: Model, b: Model) -> float:
    return 0.0 if a.parameters == b.parameters else abs(math.log(a.active / b.active)) + 1e-9


def _row(work: Work, what: str, entry: dict[str, Any]) -> tuple[_Row, float] | None:
    """Return one entry as a row; None: it is of another kind of device, or does not say this."""
    speed, device = entry.get(f"{what}_tokens_per_s"), devices.of(entry["device"])
    if not device.gpu and "NVIDIA" in entry["device"]:  # a GPU that the data file does not have
        return None
    if not speed or device.gpu != work.device.gpu or (device.gpu and device.name != work.device.name):
        return None
    if "prefill" in entry and what == "prefill":
        return None
    if (of := _known(entry["model"])) is None:
        return None
    if not device.gpu:
        device = devices.of_cores(devices.one_core(), entry.get("threads") or device.cores, device.memory)
    weights = _DTYPES.get(entry["dtype"], "bf16")
    chunk = entry.get("chunk") or (GPU_CHUNK if device.gpu else CHUNK)
    there = Work(of, entry["length"], entry["mechanism"], weights, formats.kv("auto", weights), 1, device, chunk)
    near = max(work.n, there.n) <= 4 * min(work.n, there.n)
    alike = of.parameters == work.model.parameters
    spread = (_NEAR if near else _SAME) if alike else _OTHER
    same = near and alike and there.name == work.name
    return _Row(there, measured.source(entry), spread, same), (1 if what == "decode" else there.n) / speed


@functools.cache
def _known(name: str) -> Model | None:
    """Return the model that a result names; None: its configuration is not known here."""
    try:
        return reading.model(named(name))
    except LongspanError:
        return None


def named(model: str) -> str:
    """Return the short name of a model that a result names by its file: `SmolLM2-135M-Instruct.Q4_1.gguf`."""
    from longspan.hf.configuration import short

    last = model.replace("\\", "/").rpartition("/")[2].lower()
    candidates: Sequence[str] = sorted(short(), key=len, reverse=True)
    return next((name for name in candidates if last.startswith(name)), model)
