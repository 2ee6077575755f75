"""Heat maps of needles: the mean score at each depth and length, for one who was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longspan.evals.report.curves import short
from longspan.evals.report.drawing import Panel
from longspan.evals.report.samples import Asked, Sample
from longspan.evals.report.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST, _LEAST = 10, 3
"""Bands of depths, where there are more different depths than `_MOST` + 1."""
_IN_A_CELL = 2
"""Questions that a cell should have in the mean, as long as there are `_LEAST` bands."""


@dataclass(frozen=True)
class _Axes:
    """What the maps of one task have in common, so that they can be held beside one another."""

    lengths: Sequence[int]
    bands: Sequence[tuple[float, float]]
    """Lower and upper end of each; both the same: a single depth."""

    def band(self, depth: float) -> int:
        """Return the number of the band that holds a depth."""
        return next((i for i, (_, high) in enumerate(self.bands) if depth <= high), len(self.bands) - 1)

    def said(self, band: int) -> str:
        """Return a band in percent."""
        low, high = self.bands[band]
        return f"{100 * low:.0f}" if low == high else f"{100 * low:.0f}-{100 * high:.0f}"


def maps(scores: Scores) -> list[Panel]:
    """Return the maps of an eval: of tasks whose questions have one needle each, for whoever was asked.

    Tasks that differ in depth alone make one map a kind. Other tasks make one map together where all were asked the
    same of them; else each has maps of its own.
    """
    found: dict[str, dict[Asked, dict[str, list[Sample]]]] = {}
    for sample in scores.samples:
        if sample.depth is not None:
            own = found.setdefault(sample.kind, {}).setdefault(sample.asked, {})
            own.setdefault(sample.kind or sample.task, []).append(sample)
    panels = []
    for kind, asked in found.items():
        every = list(dict.fromkeys(task for tasks in asked.values() for task in tasks))
        together = kind or all(len(tasks) == len(every) for tasks in asked.values())
        for group in [every] if together else [[task] for task in every]:
            own_samples = {who: [s for task in group for s in tasks.get(task, ())] for who, tasks in asked.items()}
            axes = _shared([samples for samples in own_samples.values() if samples])
            title = f"{len(group)} tasks" if len(group) > 1 else group[0]
            for who in (who for who in scores.names if own_samples.get(who)):
                panels.append(_map(f"{title}, {scores.names[who]}", own_samples[who], axes))
    return panels


def _map(name: str, samples: Sequence[Sample], axes: _Axes) -> Panel:
    cells: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        assert sample.depth is not None, "those without a depth were left out"
        cells.setdefault((axes.band(sample.depth), axes.lengths.index(sample.length)), []).append(sample.score)
    means = {at: sum(values) / len(values) for at, values in cells.items()}

    def draw(axis: Axes) -> None:
        import numpy as np

        grid = np.full((len(axes.bands), len(axes.lengths)), np.nan)
        for at, mean in means.items():
            grid[at] = 100 * mean
        # cividis reads alike with every kind of colour vision, and in grey. A mesh stays sharp at any size.
        mesh = axis.pcolormesh(grid, cmap="cividis", vmin=0, vmax=100, edgecolors="face", linewidth=0.2)
        axis.invert_yaxis()
        for (band, length), mean in means.items():
            ink = "#000000" if mean > 0.5 else "#ffffff"
            axis.text(length + 0.5, band + 0.5, f"{100 * mean:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks([i + 0.5 for i in range(len(axes.lengths))], [short(length) for length in axes.lengths])
        axis.set_yticks([i + 0.5 for i in range(len(axes.bands))], [axes.said(i) for i in range(len(axes.bands))])
        axis.tick_params(length=0)
        axis.set_xlabel("tokens")
        axis.set_ylabel("depth of the needle, %")
        axis.grid(visible=False)
        assert axis.figure is not None, "axes are part of a figure"
        bar = axis.figure.colorbar(mesh, ax=axis, label="score, %", shrink=0.9, pad=0.02)
        bar.outline.set_visible(False)

    lines = "; ".join(
        f"{short(length)}: "
        + ", ".join(f"{axes.said(i)} % {100 * means[i, at]:.0f}" for i in range(len(axes.bands)) if (i, at) in means)
        for at, length in enumerate(axes.lengths)
    )
    return Panel(name, f"Score by depth of the needle and length, {name}. {lines}.", draw, legend=False)


def _shared(groups: Sequence[Sequence[Sample]]) -> _Axes:
    """Return the axes for several maps: single depths if they are few, else bands that most cells have questions in."""
    lengths = sorted({sample.length for group in groups for sample in group})
    depths = sorted({sample.depth for group in groups for sample in group if sample.depth is not None})
    if len(depths) <= _MOST + 1:
        return _Axes(lengths, [(depth, depth) for depth in depths])
    most = max(len(group) / len({sample.length for sample in group}) for group in groups)
    count = max(_LEAST, min(_MOST, int(most / _IN_A_CELL)))
    return _Axes(lengths, [(i / count, (i + 1) / count) for i in range(count)])
