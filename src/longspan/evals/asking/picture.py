"""Scores of one contender as a picture: bars by task, and the average by length where there are several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.errors import SaveError, UsageError
from longspan.evals.asking.tables import AVERAGE


def picture(lines: Sequence[dict[str, Any]], title: str, about: str, file: Path) -> None:
    """Draw a table of scores as a PNG.

    Args:
        lines: of one contender, as `tables.table`.
        title: what was asked.
        about: one line under the title: model, attention, device.
        file: where the picture goes.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UsageError("pictures need matplotlib: pip install 'longspan[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({line["length"] for line in lines})
    tasks = list(dict.fromkeys(line["task"] for line in lines if line["task"] != AVERAGE))
    averages = sorted((line for line in lines if line["task"] == AVERAGE), key=lambda line: int(line["length"]))
    by_length = len(averages) > 1
    figure, axes = pyplot.subplots(
        1,
        2 if by_length else 1,
        figsize=(13 if by_length else 9, 5),
        squeeze=False,
        width_ratios=[3, 1][: 1 + by_length],
    )
    bars, width = axes[0, 0], 0.8 / len(lengths)
    colours = pyplot.get_cmap("viridis")
    for i, length in enumerate(lengths):
        own = [
            (tasks.index(line["task"]), line) for line in lines if line["length"] == length and line["task"] in tasks
        ]
        bars.bar(
            [at + (i - (len(lengths) - 1) / 2) * width for at, _ in own],
            [line["score"] for _, line in own],
            width,
            yerr=_whiskers([line for _, line in own]),
            color=colours(0.15 + 0.7 * i / max(1, len(lengths) - 1)),
            error_kw={"elinewidth": 0.8, "capsize": 2},
            label=f"{length:,} tokens",
        )
    bars.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
    bars.set_ylabel("score, % (95 % intervals)")
    bars.legend(fontsize=8, frameon=False, loc="upper right")
    if by_length:
        line = axes[0, 1]
        line.errorbar(
            [each["length"] for each in averages],
            [each["score"] for each in averages],
            yerr=_whiskers(averages),
            marker="o",
            capsize=3,
        )
        line.set_xscale("log", base=2)
        line.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths])
        line.minorticks_off()
        line.set_xlabel("tokens")
        line.set_title("average of tasks", fontsize=10)
    for axis in axes.flat:
        axis.set_ylim(0, 105)
        axis.grid(axis="y", alpha=0.3)
    figure.suptitle(f"{title}\n{about}", fontsize=11)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    except OSError as error:
        raise SaveError(f"can't write {file}: {error.strerror or error}") from error
    finally:
        pyplot.close(figure)


def _whiskers(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Return the distances of intervals' ends from their means, as matplotlib takes them."""
    return [[line["score"] - line["low"] for line in lines], [line["high"] - line["score"] for line in lines]]
