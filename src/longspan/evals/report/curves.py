"""Pictures of scores: against length, a curve for each who was asked or for each task, and against bytes kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longspan.evals.report.drawing import GREY, Panel, look
from longspan.evals.report.samples import Asked
from longspan.evals.report.scale import PERCENT, Scale
from longspan.evals.report.scores import AVERAGE, Cell, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BESIDE = 0.45
"""The share of the smallest distance between two lengths over which curves are spread, so that intervals at one length
stand side by side."""
GUESSING = "guessing"
"""Who answers in the right form without having read."""

Curve = tuple[str, int, Sequence[tuple[int, Cell]]]
"""A name, the number of its style, and its cells by length."""
Chances = Sequence[tuple[str, Sequence[tuple[int, float]]]]
"""Dotted curves of what guessing scores by length, from 0 to 1, each with its colour."""


def by_length(scores: Scores, task: str) -> Panel:
    """Return the picture of a task (or `AVERAGE`) against length, a curve for each who was asked."""
    title = f"average of {len(scores.tasks)} tasks" if task == AVERAGE else task
    curves = [(name, i, _cells(scores, who, task)) for i, (who, name) in enumerate(scores.names.items())]
    chances = [(GREY, _guessed(scores, task))]
    return _against_length(scores, title, [curve for curve in curves if curve[2]], chances, legend=len(curves) > 1)


def by_task(scores: Scores, who: Asked) -> Panel:
    """Return the picture of one who was asked against length, a curve for each task."""
    curves = [(task, i, _cells(scores, who, task)) for i, task in enumerate(scores.tasks)]
    curves = [curve for curve in curves if curve[2]]
    chances = [(str(look(style)["color"]), _guessed(scores, task)) for task, style, _ in curves]
    if len({round(chance, 2) for _, found in chances for _, chance in found}) == 1 and all(
        found for _, found in chances
    ):
        chances = [(GREY, chances[0][1])]  # one line for all
    return _against_length(scores, scores.names[who], curves, chances, legend=True)


def by_bytes(scores: Scores, length: int) -> Panel | None:
    """Return the picture of scores at one length against bytes kept of the context.

    The same mechanism with other numbers in its options is one curve. None where fewer than two different numbers of
    bytes are known.
    """
    task = scores.whole
    if task is None:
        return None
    found = {who: cell for who in scores.names if (cell := scores.cell(who, task, length)) and cell.kept_bytes}
    if len({round(cell.kept_bytes) for cell in found.values()}) < 2:
        return None
    families: dict[tuple[str, str], list[tuple[Asked, Cell]]] = {}
    for who, cell in found.items():
        families.setdefault((who.model, who.family), []).append((who, cell))

    def draw(axis: Axes) -> None:
        for i, ((_, family), points) in enumerate(families.items()):
            points.sort(key=lambda point: point[1].kept_bytes)
            cells = [cell for _, cell in points]
            axis.errorbar(
                [cell.kept_bytes for cell in cells],
                [scores.scale.shown(cell.score.mean) for cell in cells],
                yerr=_whiskers(scores.scale, cells),
                capsize=2.5,
                elinewidth=0.9,
                label=scores.names[points[0][0]] if len(points) == 1 else family,
                **{**look(i), "markersize": 7},
            )
        axis.set_xscale("log")
        _byte_ticks(axis, [cell.kept_bytes for cell in found.values()])
        axis.set_xlabel("bytes kept of a context")
        _scaled(axis, scores.scale)

    told = "; ".join(
        f"{scores.names[who]} {scores.scale.written(cell.score.mean)} with {size(cell.kept_bytes)}"
        for who, cell in found.items()
    )
    title = f"{length:,} tokens"
    return Panel(title, f"{scores.scale.title} against bytes kept, at {title}: {told}.", draw)


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def short(length: int) -> str:
    """Return a length as people say it: `8K`, `1M`, `900`."""
    for unit, each in (("M", 1 << 20), ("K", 1 << 10)):
        if length >= each:
            return f"{length / each:.3g}{unit}"
    return str(length)


def _cells(scores: Scores, who: Asked, task: str) -> list[tuple[int, Cell]]:
    return [(length, cell) for length in scores.lengths if (cell := scores.cell(who, task, length))]


def _guessed(scores: Scores, task: str) -> list[tuple[int, float]]:
    return [(length, chance) for length in scores.lengths if (chance := scores.guessed(task, length))]


def _against_length(scores: Scores, title: str, curves: Sequence[Curve], guessed: Chances, *, legend: bool) -> Panel:
    scale = scores.scale
    guessed = [(colour, points) for colour, points in guessed if points]

    def draw(axis: Axes) -> None:
        lengths = sorted({length for _, _, cells in curves for length, _ in cells})
        gaps = [math.log2(b / a) for a, b in itertools.pairwise(lengths)]
        step = _BESIDE * min(gaps, default=1.0) / max(1, len(curves) - 1)
        for place, (name, style, cells) in enumerate(curves):
            # On a logarithmic axis a factor moves every point by the same distance.
            aside = 2.0 ** (step * (place - (len(curves) - 1) / 2)) if len(curves) > 1 else 1.0
            axis.errorbar(
                [length * aside for length, _ in cells],
                [scale.shown(cell.score.mean) for _, cell in cells],
                yerr=_whiskers(scale, [cell for _, cell in cells]),
                capsize=2.5,
                elinewidth=0.9,
                label=name,
                **look(style),
            )
        for colour, points in guessed:
            # Each point is a short level line, so that one length has one as well.
            for length, chance in points:
                ends = [length / 2**0.4, length * 2**0.4]
                axis.plot(ends, [scale.shown(chance)] * 2, color=colour, linewidth=1.1, linestyle=":")
        if guessed:
            axis.plot([], [], color=GREY, linewidth=1.1, linestyle=":", label=GUESSING)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short(length) for length in lengths])
        axis.minorticks_off()
        axis.margins(x=0.08 if len(lengths) > 1 else 0.5)
        axis.set_xlabel("tokens")
        _scaled(axis, scale)

    told = "; ".join(
        f"{name}: " + ", ".join(f"{short(length)} {scale.written(cell.score.mean)}" for length, cell in cells)
        for name, _, cells in curves
    )
    if len(guessed) == 1:
        told += f"; {GUESSING}: " + ", ".join(f"{short(n)} {scale.written(chance)}" for n, chance in guessed[0][1])
    return Panel(title, f"{scale.title} against length, {title}. {told}.", draw, legend=legend or bool(guessed))


def _whiskers(scale: Scale, cells: Sequence[Cell]) -> list[list[float]]:
    """Return the distances of intervals' ends from their means, as matplotlib takes them."""
    ends = [[scale.shown(value) for value in (c.score.low, c.score.mean, c.score.high)] for c in cells]
    return [[mean - low for low, mean, _ in ends], [high - mean for _, mean, high in ends]]


def _scaled(axis: Axes, scale: Scale) -> None:
    if scale is PERCENT:
        axis.set_ylim(-3, 103)
    axis.set_ylabel(f"{scale.title} (95 % intervals)")


def _byte_ticks(axis: Axes, counts: Sequence[float]) -> None:
    """Put ticks at 1, 2 and 5 times powers of ten, so that even a narrow range has some."""
    low, high = min(counts) / 1.5, max(counts) * 1.5
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [lead * 10.0**power for power in powers for lead in (1, 2, 5) if low <= lead * 10.0**power <= high]
    if len(ticks) > 8:
        ticks = [tick for tick in ticks if math.log10(tick) % 1 < 1e-9]
    if len(ticks) < 2:
        ticks = [min(counts), max(counts)]
    axis.set_xticks(ticks, [size(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(low, high)
