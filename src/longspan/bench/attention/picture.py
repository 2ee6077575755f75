"""The log-log picture of a result: time against context, ours, peers and the floor, a panel for each part.

A power law is a straight line there, and its slope is the exponent. It measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longspan.bench.attention.measure import WHATS
from longspan.bench.attention.report import duration, times_of, words
from longspan.bench.attention.sides import OURS
from longspan.evals.report.drawing import canvas

_STYLES = {
    OURS: ("Longspan", "#0072b2", "o", "-"),
    "superlinear": ("superlinear 0.1.0 (PyPI)", "#d55e00", "s", "-"),
    "sdpa-cudnn": ("dense, cuDNN", "#000000", "^", "--"),
    "sdpa-flash": ("dense, FlashAttention", "#7f7f7f", "v", "--"),
    "sdpa": ("dense, PyTorch", "#000000", "^", "--"),
}
"""Label, colour (told apart by the colour-blind: Okabe and Ito's), marker and line of each side."""


def picture(result: dict[str, Any], file: Path) -> None:
    """Draw a result as a PNG.

    Args:
        result: as `report.result` gives it, or a file of `benchmarks/results`.
        file: where the picture goes.

    Raises:
        UsageError: matplotlib is not installed.
        SaveError: the file can't be written.
    """
    parts = [what for what in WHATS if any(row["what"] == what for row in result["rows"])]
    with canvas(file, 1, len(parts), (6.2 * len(parts), 5.4), squeeze=False) as (figure, axes):
        for axis, what in zip(axes[0], parts, strict=True):
            _panel(axis, what, [row for row in result["rows"] if row["what"] == what])
        drawn: dict[str, Any] = {}
        for axis in axes[0]:
            handles, labels = axis.get_legend_handles_labels()
            drawn |= dict(zip(labels, handles, strict=True))
        figure.legend(drawn.values(), drawn.keys(), loc="lower center", ncols=3, fontsize=9, frameon=False)
        of = result["of"]
        layer = f"{of['heads']} query heads, {of['kv_heads']} KV heads, head size {of['head_dim']}, {of['dtype']}"
        about = f"{result['device']}; {layer}; {of['routing']} inputs"
        figure.suptitle(f"One layer's attention, {of['mechanism']}\n{about}", fontsize=11)
        figure.tight_layout(rect=(0, 0.05 + 0.035 * -(-len(drawn) // 3), 1, 1))


def _panel(axis: Any, what: str, rows: list[dict[str, Any]]) -> None:
    for name, seconds in times_of(rows).items():
        label, colour, marker, line = _STYLES[name]
        axis.plot(
            [*seconds],
            [*seconds.values()],
            label=label,
            color=colour,
            marker=marker,
            markersize=5,
            linestyle=line,
            linewidth=2.2 if name == OURS else 1.4,
            zorder=3 if name == OURS else 2,
        )
    floors = {row["length"]: row["sides"][OURS]["floor"]["seconds"] for row in rows if "floor" in row["sides"][OURS]}
    if floors:
        label = "least bytes and FLOPs of ours"
        axis.plot([*floors], [*floors.values()], label=label, color="#56b4e9", linestyle=":", linewidth=1.8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    lengths = sorted({row["length"] for row in rows})
    axis.set_xticks(lengths, [words(length) for length in lengths])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda seconds, _: duration(seconds))
    axis.grid(alpha=0.3)
    axis.set_xlabel("tokens of context")
    chunk = max(row["queries"] for row in rows)
    titles = {"decode": "decode: one query", "prefill": f"prefill: the newest {words(chunk)} queries"}
    axis.set_title(titles.get(what, f"backward of {words(chunk)} queries"), fontsize=10)
