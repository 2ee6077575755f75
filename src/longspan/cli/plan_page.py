"""The page of a plan: what `longspan plan` and `--max-context` tell, with memory bars and curves, in one file."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.cli import plan_pictures
from longspan.cli.plan_words import heading, limits_table, rows, speeds, verdict
from longspan.evals.report.drawing import Panel, available, svg
from longspan.evals.report.page import Part, Picture, Section, Table, Value
from longspan.evals.report.page import page as html
from longspan.planner.limits import Longest
from longspan.planner.plan import Plan
from longspan.planner.words import size


def page(found: Plan, limits: Sequence[Longest]) -> str:
    """Return the page of a plan as HTML that loads nothing from anywhere."""
    about, how = heading(found)
    notes = [*found.notes, *([] if available() else ["Pictures need matplotlib: pip install 'longspan[eval]'"])]
    sections = [_plan(found), _longest(found, limits)]
    facts = [("model", about), ("asked", how), *(("times rest on", line) for line in found.by)]
    facts += [("device", f"{found.asked.device.title}: {line}") for line in found.asked.device.sources]
    title = f"{found.asked.model.name}: {verdict(found).partition(':')[0]}"
    return html(title, how, facts, notes, sections, made_by="longspan plan", how="What it rests on")


def pictures(panels: Sequence[Panel]) -> list[Picture]:
    """Return panels as pictures of a page; none where they can't be drawn."""
    return [Picture(svg(panel), "svg+xml", panel.alt) for panel in panels] if available() else []


def _plan(found: Plan) -> Section:
    each = " on each GPU" if found.asked.ranks.count > 1 else ""
    held = [
        (name, [Value(count, about, min(1.0, share)), Value(f"{100 * share:.1f} %")])
        for name, count, about, share in rows(found)
    ]
    room = found.asked.device.memory
    share = found.memory.total / room
    held.append(
        ("total", [Value(size(found.memory.total), f"of {size(room)}", min(1.0, share)), Value(f"{100 * share:.1f} %")])
    )
    parts: list[Part] = [
        Table(f"Memory{each}: {verdict(found)}", ["what", "bytes", "of the device"], held, strong="total"),
        Table(
            "Times, at best and at worst",
            ["what", "range"],
            [(name, [Value(told, words=True)]) for name, told in speeds(found)],
        ),
    ]
    if found.advice:
        changes = [
            (
                each.what,
                [
                    Value(each.option, words=True),
                    Value(size(each.total), "fits" if each.fits else ""),
                    Value(each.harm, words=True),
                ],
            )
            for each in found.advice
        ]
        parts.append(
            Table(
                "What to change, in order of harm; changes add up", ["change", "option", "bytes then", "harm"], changes
            )
        )
    if drawn := pictures(plan_pictures.speeds(found)):
        parts += ["Speed against context", drawn]
    return Section("Does it fit, how fast is it", "", parts)


def _longest(found: Plan, limits: Sequence[Longest]) -> Section:
    titles, lines = limits_table(list(limits))
    table = Table(
        "The longest context that fits, without rotated keys (--kv-budget)",
        titles,
        [(line[0], [Value(text) for text in line[1:]]) for line in lines],
    )
    parts: list[Part] = [table]
    if drawn := pictures(plan_pictures.memory(found)):
        parts += ["Memory against context", drawn]
    return Section("How long may a context be", "", parts)
