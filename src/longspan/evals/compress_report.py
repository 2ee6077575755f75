"""A comparison of ways to compress, as a table and as a picture: three panels over the share of bytes kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longspan.evals.report.drawing import canvas, colours

COLUMNS = (">ratio", "who", "way", ">kept", ">score", ">95 %", ">perplexity", ">as dense")
"""Titles of the table; a title that begins with > stands over numbers. Perplexity is a ratio to dense."""


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a line of text a row, the best score of each ratio first, in the order of `COLUMNS`."""
    return [
        [
            f"{row['ratio']:g}",
            row["who"],
            row["way"],
            f"{row['kept_share']:.1%}",
            f"{row['score']:.1%}",
            f"{row['low']:.0%}-{row['high']:.0%}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['agreement']:.1%}",
        ]
        for row in sorted(rows, key=lambda row: (row["ratio"], -row["score"], row["perplexity_ratio"]))
    ]


def picture(rows: Sequence[dict[str, Any]], about: str, file: Path) -> None:
    """Draw a comparison as a PNG.

    Args:
        rows: as `compress.Row`.
        about: one line under the title: model, device.
        file: where the picture goes.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("mean score of the tasks, %", lambda row: 100 * float(row["score"])),
        ("perplexity / dense", lambda row: float(row["perplexity_ratio"])),
        ("likeliest token as dense, %", lambda row: 100 * float(row["agreement"])),
    )
    with canvas(file, 1, 3, (16, 6.5), sharex=True) as (figure, axes):
        names = [(r["who"], r["way"]) for r in rows if r["way"] != "dense"]
        names = list(dict.fromkeys(names))
        sides = list(dict.fromkeys(who for who, _ in names))
        dense = next((row for row in rows if row["way"] == "dense"), None)
        for axis, (title, value) in zip(axes.flat, panels, strict=True):
            for i, ((who, way), colour) in enumerate(zip(names, colours(len(names)), strict=True)):
                own = sorted((r["kept_share"], value(r)) for r in rows if (r["who"], r["way"]) == (who, way))
                axis.plot(
                    [share for share, _ in own],
                    [figure_ for _, figure_ in own],
                    marker="osv^D"[i % 5],
                    markersize=4,
                    linewidth=1.2,
                    linestyle=("-", ":", "--")[sides.index(who) % 3],
                    color=colour,
                    label=f"{who} {way}",
                )
            if dense is not None:
                axis.axhline(value(dense), color="black", linewidth=0.8, label="dense")
            axis.set_title(title, fontsize=10)
            axis.set_xscale("log", base=2)
            shares = sorted({1 / row["ratio"] for row in rows if row["way"] != "dense"})
            axis.set_xticks(shares, [f"1/{1 / share:g}" for share in shares])
            axis.set_xlabel("share of dense's bytes kept")
            axis.grid(alpha=0.3)
        axes[1].set_yscale("log")
        for which in ("major", "minor"):
            getattr(axes[1].yaxis, f"set_{which}_formatter")("{x:.3g}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=7.5, frameon=False)
        figure.suptitle(f"What keeping fewer bytes costs\n{about}", fontsize=11)
        figure.tight_layout(rect=(0, 0.02 + 0.028 * (len(labels) // 5 + 1), 1, 1))
