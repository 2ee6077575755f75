"""The picture and the page of `longspan cost`: money against the number of questions, for every way to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from longspan.cli.plan_page import pictures
from longspan.evals.report.drawing import COLOURS, Panel, look, png
from longspan.evals.report.page import Part, Section, Table, Value
from longspan.evals.report.page import page as html
from longspan.lengths import short
from longspan.planner.cost import WAYS, Job, Payer, by_queries
from longspan.planner.words import money

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {"whole": "whole every time", "cached": "cached session", "retrieval": "retrieval", "hybrid": "hybrid"}


def write(job: Job, payer: Payer, file: Path) -> None:
    """Write the picture as a PNG (UsageError: matplotlib is not installed; SaveError: it can't be written)."""
    png(panels(job, payer), f"What questions to {short(job.tokens)} tokens cost", payer.name, file)


def panels(job: Job, payer: Payer) -> list[Panel]:
    """Return the pictures: money against questions, and against the length of the text."""
    counts = [round(10 ** (i / 4)) for i in range(17)]
    counts = sorted({*counts, job.queries})
    lengths = [round(1000 * 10 ** (i / 3)) for i in range(13) if 1000 * 10 ** (i / 3) <= 4 * job.tokens] or [job.tokens]
    lines = {n: by_queries(replace(job, tokens=n), payer, [job.queries]) for n in lengths}
    by_length = {way: [lines[n][way][0] for n in lengths] for way in WAYS}
    return [
        _panel("questions", f"{short(job.tokens)} tokens", counts, by_queries(job, payer, counts), job.queries),
        _panel("tokens", f"{job.queries:,} questions", lengths, by_length, job.tokens),
    ]


def _panel(what: str, title: str, at: Sequence[int], curves: dict[str, list[float]], asked: int) -> Panel:
    def draw(axis: Axes) -> None:
        for i, (way, values) in enumerate(curves.items()):
            axis.plot(at, values, label=_TITLES[way], **{**look(i), "markersize": 3.5})
        axis.axvline(asked, color=COLOURS[6], linewidth=0.9, linestyle=":")
        axis.set_xscale("log")
        axis.set_yscale("log")
        powers = [10**power for power in range(10) if at[0] <= 10**power <= at[-1]]
        axis.set_xticks(powers, [short(power) for power in powers])
        low, high = axis.get_ylim()
        dollars = [10.0**power for power in range(-8, 9) if low <= 10.0**power <= high]
        axis.set_yticks(dollars, [f"${each:g}" if each < 1 else f"${each:,.0f}" for each in dollars])
        axis.minorticks_off()
        axis.set_xlabel(what)

    told = "; ".join(f"{_TITLES[way]} {money(values[0])} to {money(values[-1])}" for way, values in curves.items())
    return Panel(title, f"Money against {what}, {title}, from {at[0]:,} to {at[-1]:,}: {told}.", draw)


def page(
    title: str,
    job: Job,
    payer: Payer,
    table: tuple[list[str], list[list[str]]],
    told: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the page as HTML that loads nothing from anywhere."""
    titles, rows = table
    parts: list[Part] = [
        Table("Four ways to answer", titles, [(row[0], [Value(text) for text in row[1:]]) for row in rows]),
        Table(
            "Where one becomes cheaper than another",
            ["number", "break-even"],
            [(str(i), [Value(line, words=True)]) for i, line in enumerate(told, 1)],
        ),
    ]
    if drawn := pictures(panels(job, payer)):
        parts += ["Money", drawn]
    facts = [("paid", payer.name), *(("note", note) for note in notes)]
    sections = [Section("What it costs", "", parts)]
    return html("What questions cost", title, facts, [], sections, made_by="longspan cost", how="What it rests on")
