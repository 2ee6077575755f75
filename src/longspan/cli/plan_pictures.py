"""Pictures of a plan: memory against context by mechanism and KV format, and speeds against context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.plan_words import heading
from longspan.evals.report.drawing import COLOURS, Panel, look, png
from longspan.lengths import short
from longspan.planner import limits, plan, words
from longspan.planner.measured import Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 1.15
"""How far above the largest of memory and need the memory axis goes, and below the smallest."""

_POWERS = [10.0**power for power in range(-6, 16)]
_CLOCK = [*_POWERS[:8], 60, 600, 3600, 36_000, 86_400, 864_000, 8_640_000]
"""Seconds that are round for people: powers of ten up to 10, then minutes, hours and days."""


def write(found: plan.Plan, file: Path) -> None:
    """Write the pictures of memory as a PNG (UsageError: matplotlib is not installed; SaveError: can't be written)."""
    title, about = heading(found)
    png(memory(found), title.split(", ")[0] + ": memory against context", about, file)


def memory(found: plan.Plan) -> list[Panel]:
    """Return the pictures of memory against context."""
    asked = found.asked
    lengths = limits.contexts(asked)
    return [
        _bytes(f"by mechanism, KV {asked.kv}", limits.by_mechanism(asked, lengths), lengths, found),
        _bytes(f"{asked.attention}, by KV format", limits.by_format(asked, lengths), lengths, found),
    ]


def speeds(found: plan.Plan) -> list[Panel]:
    """Return the pictures of time to first token and of decode speed against context, with their ranges."""
    asked = found.asked
    lengths = [n for n in limits.contexts(asked) if n <= 4 * asked.context]
    specs = list(dict.fromkeys([asked.attention, *(["dense"] if asked.placement is None else [])]))
    plans = {spec: [plan.planned(replace(asked, attention=spec, context=n)) for n in lengths] for spec in specs}
    return [
        _band("time to first token", "seconds", plans, lengths, lambda each: each.first_token, found),
        _band("decode", "tokens/s", plans, lengths, lambda each: Range(*each.decode_tokens_per_s), found),
    ]


def _bytes(title: str, curves: Mapping[str, Sequence[float]], lengths: Sequence[int], found: plan.Plan) -> Panel:
    room = found.asked.device.memory

    def draw(axis: Axes) -> None:
        for i, (name, values) in enumerate(curves.items()):
            axis.plot(lengths, values, label=name, **{**look(i), "markersize": 3.5})
        axis.axhline(room, color=COLOURS[6], linewidth=1.2, linestyle="--", label=f"device, {words.size(room)}")
        _contexts(axis, lengths, found)
        axis.set_yscale("log")
        top = _SHOWN * 3 * max(room, found.memory.total)
        axis.set_ylim(min(min(values) for values in curves.values()) / _SHOWN, top)
        _ticks(axis, top, _POWERS, lambda count: words.size(count).replace(".0 ", " "))

    told = "; ".join(
        f"{name}: {words.size(values[0])} at {short(lengths[0])} to {words.size(values[-1])} at {short(lengths[-1])}"
        for name, values in curves.items()
    )
    return Panel(title, f"Memory against context, {title}; the device has {words.size(room)}. {told}.", draw)


def _band(
    title: str,
    unit: str,
    plans: Mapping[str, Sequence[plan.Plan]],
    lengths: Sequence[int],
    of: Callable[[plan.Plan], Range],
    found: plan.Plan,
) -> Panel:
    ranges = {spec: [of(each) for each in made] for spec, made in plans.items()}

    def draw(axis: Axes) -> None:
        for i, (spec, values) in enumerate(ranges.items()):
            style = look(i)
            axis.plot(lengths, [each.middle for each in values], label=spec, **{**style, "markersize": 3.5})
            lows, highs = [each.low for each in values], [each.high for each in values]
            axis.fill_between(lengths, lows, highs, color=style["color"], alpha=0.18, linewidth=0)
        _contexts(axis, lengths, found)
        axis.set_yscale("log")
        told, steps = (words.seconds, _CLOCK) if unit == "seconds" else (words.digits, _POWERS)
        _ticks(axis, axis.get_ylim()[1], steps, told)
        axis.set_ylabel(unit if unit != "seconds" else "")

    described = "; ".join(
        f"{spec} at {short(lengths[-1])}: {words.digits(values[-1].low)} to {words.digits(values[-1].high)} {unit}"
        for spec, values in ranges.items()
    )
    return Panel(title, f"{title} against context, as ranges. {described}.", draw, legend=len(ranges) > 1)


def _contexts(axis: Axes, lengths: Sequence[int], found: plan.Plan) -> None:
    """Make the axis of contexts, with a mark at the one that was asked for."""
    axis.axvline(found.asked.context, color=COLOURS[6], linewidth=0.9, linestyle=":")
    axis.set_xscale("log")
    powers = [10**power for power in range(3, 13) if lengths[0] <= 10**power <= lengths[-1]]
    axis.set_xticks(powers, [short(each) for each in powers])
    axis.minorticks_off()
    axis.set_xlabel("tokens")


def _ticks(axis: Axes, top: float, steps: Sequence[float], told: Callable[[float], str]) -> None:
    """Put ticks at round values, and between them where there are few."""
    low = axis.get_ylim()[0]
    inside = [each for each in steps if low <= each <= top]
    if len(inside) < 3:
        inside = [lead * power for power in _POWERS for lead in (1, 2, 5) if low <= lead * power <= top]
    axis.set_yticks(inside, [told(each) for each in inside])
    axis.minorticks_off()
