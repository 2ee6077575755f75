"""A comparison as a table and as a picture: four panels over the share of keys read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from longspan.evals.report.drawing import canvas, colours

COLUMNS = ("mechanism", ">budget", ">length", ">keys", ">perplexity", ">as dense", ">needles", ">tokens/s", ">/ dense")
"""Titles of the table; a title that begins with > stands over numbers. Perplexity and the last are ratios to dense."""


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a line of text a row, in the order of `COLUMNS`."""
    return [
        [
            row["mechanism"],
            row["budget"],
            str(row["length"]),
            f"{row['keys']:.0f}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['agreement']:.1%}",
            f"{row['needles']}/{row['questions']}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_ratio']:.2f}",
        ]
        for row in rows
    ]


def picture(rows: Sequence[dict[str, Any]], about: str, file: Path) -> None:
    """Draw a comparison of one length as a PNG.

    Args:
        rows: as `compare.Row`, of one length.
        about: one line under the title: model, device.
        file: where the picture goes.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("perplexity / dense", lambda row: float(row["perplexity_ratio"])),
        ("greedy tokens as dense, %", lambda row: 100 * float(row["agreement"])),
        ("multi-key needles, %", lambda row: 100 * float(row["needles"]) / max(1, int(row["questions"]))),
        ("decode speed / dense", lambda row: float(row["decode_ratio"])),
    )
    with canvas(file, 2, 2, (11, 8), sharex=True) as (figure, axes):
        names = [name for name in dict.fromkeys(row["mechanism"] for row in rows) if name != "dense"]
        dense = next((row for row in rows if row["mechanism"] == "dense"), None)
        for axis, (title, value) in zip(axes.flat, panels, strict=True):
            for i, (name, colour) in enumerate(zip(names, colours(len(names)), strict=True)):
                own = sorted((float(Fraction(r["budget"])), value(r)) for r in rows if r["mechanism"] == name)
                axis.plot(
                    [share for share, _ in own],
                    [figure_ for _, figure_ in own],
                    marker="osv^D"[i % 5],
                    linestyle=("-", "--", ":")[i % 3],
                    color=colour,
                    label=name,
                )
            if dense is not None:
                axis.axhline(value(dense), color="black", linewidth=0.8, label="dense")
            axis.set_title(title, fontsize=10)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
            shares = sorted({float(Fraction(r["budget"])) for r in rows if r["mechanism"] != "dense"})
            axis.set_xticks(shares, [str(Fraction(share).limit_denominator(1024)) for share in shares])
        axes[0, 0].set_yscale("log")
        for which in ("major", "minor"):
            getattr(axes[0, 0].yaxis, f"set_{which}_formatter")("{x:.4g}")
        for axis in axes[1]:
            axis.set_xlabel("share of the context's keys that a query may read")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(f"What reading less costs, {rows[0]['length']:,} tokens\n{about}", fontsize=11)
        figure.tight_layout(rect=(0, 0.01 + 0.025 * (len(labels) // 4 + 1), 1, 1))
