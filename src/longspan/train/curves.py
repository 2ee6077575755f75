"""Loss and agreement over a training's steps as a picture; from its log alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.errors import UsageError

_LABELS = {
    "found": "far attention mass in the chosen spans", "by_query": "the same, searched by the query itself",
    "exact": "answers that are right whole", "token": "answers' tokens that are right",
    "searched": "the same where questions read what they find",
}  # fmt: skip


def draw(log: Path, file: Path) -> None:
    """Draw the rows of a log (UsageError: matplotlib is not installed)."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("curves are drawn by matplotlib: pip install 'longspan[train]'") from error
    mpl.use("Agg", force=False)
    from matplotlib.figure import Figure

    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    shares = [name for name in _LABELS if any(name in row for row in rows)]
    figure = Figure(figsize=(8, 3 + 3 * bool(shares)), dpi=120, layout="constrained")
    axes = figure.subplots(1 + bool(shares), 1, sharex=True, squeeze=False)[:, 0]
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["loss"] for row in rows], color="0.8", linewidth=0.8)
    axes[0].plot(steps, _smooth([row["loss"] for row in rows]), color="tab:blue", label="loss (smoothed)")
    axes[0].set_ylabel("loss")
    axes[0].set_ylim(bottom=0)
    for name, colour in zip(shares, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=False):
        known = [row for row in rows if name in row]
        axes[1].plot([r["step"] for r in known], _smooth([r[name] for r in known]), color=colour, label=_LABELS[name])
    if shares:
        axes[1].set_ylim(0, 1.02)
        axes[1].set_ylabel("share")
    for one in axes:
        one.legend(frameon=False, fontsize=8)
        one.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(file)


def _smooth(values: list[float], keep: float = 0.9) -> list[float]:
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out
