"""How pictures look, and how they become PNG files and SVG for a page.

Colours are Okabe and Ito's ("Color Universal Design", 2008) without those that vanish on white or on black; markers and
line styles tell series apart without colour. A picture in a page is SVG whose ink follows the reader's light or dark
mode. It does not know what is drawn.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from longspan.errors import SaveError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8C8C8C"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", GREY)
MARKERS = "osv^DPX"
LINES = ("-", "--", ":", "-.")

_INK = "#1f2124"
"""What is drawn in it follows the reader's mode, in SVG."""
_MODES = b"<style>svg{color:#1f2124}@media (prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"
_PANEL = (5.4, 3.7)
"""Inches: 518 pixels wide in a page, and still readable where a phone shows it at 360."""
_ACROSS = 60
"""Characters of a panel's title, or of a name under it, on one line."""


def available() -> bool:
    """Return whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


@dataclass(frozen=True)
class Panel:
    """One pair of axes, before it is drawn."""

    title: str
    alt: str
    """What it shows, in words, for whoever does not see it."""
    draw: Callable[[Axes], None]
    legend: bool = True
    """Whether its series need a legend."""


def look(number: int) -> dict[str, Any]:
    """Return the style of the series of that number, from 0, as matplotlib's `plot` and `errorbar` take it."""
    again = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        # One of a colour that comes again has another marker as well as another line.
        "marker": MARKERS[(number + 3 * again) % len(MARKERS)],
        "linestyle": LINES[again % len(LINES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def png(panels: Sequence[Panel], title: str, about: str, file: Path) -> None:
    """Draw panels side by side, under one title, as a PNG.

    Args:
        panels: at least one.
        title: of all.
        about: one line under the title: model, device.
        file: where the picture goes.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    across = min(len(panels), 3) if len(panels) != 4 else 2
    down = math.ceil(len(panels) / across)
    with _figure(across, down) as figure:
        axes = figure.subplots(down, across, squeeze=False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_axis_off()
        _legend(figure, [axis for axis, panel in zip(axes.flat, panels, strict=False) if panel.legend], 2 * across)
        figure.suptitle("\n".join([title, *textwrap.wrap(about, _ACROSS * across)[:2]]), fontsize=11)
        _put(figure, file)


@contextmanager
def canvas(
    file: Path, down: int, across: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Yield an empty figure in matplotlib's own style and its axes, and write it as a PNG once it is drawn.

    Args:
        file: where the picture goes.
        down: rows of axes.
        across: axes of a row.
        size: width and height in inches.
        options: as `Figure.subplots` takes them.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    yield figure, figure.subplots(down, across, **options)
    _put(figure, file)


def colours(count: int) -> list[Any]:
    """Return colours for so many series; after the twentieth come the first again."""
    known = matplotlib().colormaps["tab20"].colors
    return [known[i % len(known)] for i in range(count)]


def matplotlib() -> ModuleType:
    """Return the library (UsageError: it is not installed)."""
    try:
        return importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UsageError("pictures need matplotlib: pip install 'longspan[eval]'") from error


def _put(figure: Figure, file: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    put(file, drawn.getvalue())


def put(file: Path, data: bytes) -> None:
    """Write a file as a whole or not at all: parts of one run may end, and report, at the same time.

    Raises:
        SaveError: it can't be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        try:
            part.write_bytes(data)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"can't write {file}: {error.strerror or error}") from error


def svg(panel: Panel) -> bytes:
    """Draw one panel as SVG; the same panel gives the same bytes (UsageError: matplotlib is not installed)."""
    with _figure(1, 1) as figure:
        axis = figure.subplots()
        _draw(axis, panel)
        if panel.legend:
            _legend(figure, [axis], 2)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    data = drawn.getvalue()
    data = data[data.index(b"<svg") :].replace(_INK.encode(), b"currentColor")
    head, _, rest = data.partition(b">")
    return head + b">" + _MODES + rest


def _draw(axis: Axes, panel: Panel) -> None:
    axis.set_title(textwrap.fill(panel.title, _ACROSS), fontsize=10)
    panel.draw(axis)


def _legend(figure: Figure, axes: Sequence[Axes], across: int) -> None:
    """Name every series of several axes once, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(textwrap.fill(label, _ACROSS), handle)
    if found:
        longest = max(len(line) for label in found for line in label.splitlines())
        columns = max(1, min(across, len(found), across * 34 // max(1, longest)))
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
        )


@contextmanager
def _figure(across: int, down: int) -> Iterator[Figure]:
    """Yield an empty figure for so many panels, in our style; nobody else's style is touched."""
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = dict.fromkeys(ink, _INK) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "grid.color": GREY,
        "font.size": 9,
        "svg.hashsalt": "longspan",
        # Text stays text, which takes a tenth of the bytes that outlines do.
        "svg.fonttype": "none",
    }
    with matplotlib().rc_context(style):
        # Without pyplot there is no window system and no global state: threads may draw.
        from matplotlib.figure import Figure

        width, height = _PANEL
        yield Figure(figsize=(width * across, height * down + (0.5 if across * down > 1 else 0)), layout="constrained")
