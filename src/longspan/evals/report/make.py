"""Makes a report: from rows of journals to figures, and to a page and pictures in a folder.

    report = make(entries)          figures alone
    files = write(report, folder)   report.html and PNGs

It does not know where rows come from, nor how figures are told on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import SaveError, UsageError
from longspan.evals.journal import Entry, merged
from longspan.evals.report import sections
from longspan.evals.report.asides import Aside, asides
from longspan.evals.report.drawing import Panel, available, png, put, svg
from longspan.evals.report.page import Fold, Part, Picture, Section, Table, Value, page
from longspan.evals.report.samples import Asked, samples
from longspan.evals.report.scores import Scores

PAGE = "report.html"
NO_PICTURES = "Pictures need matplotlib: pip install 'longspan[eval]'"

_MOST_PANELS = 24
"""Pictures of one kind in a page: beyond them the tables tell the rest."""


@dataclass(frozen=True)
class Report:
    """Figures of all evals in some journals."""

    scores: Sequence[Scores]
    asides: Sequence[Aside]
    environment: dict[str, Any]
    """Fields that differ between runs hold each value once, with semicolons between."""
    notes: Sequence[str]

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "environment": self.environment,
            "notes": list(self.notes),
            "scores": [line for scores in self.scores for line in scores.lines()],
            "differences": [line for scores in self.scores for line in _differences(scores)],
            "others": [{"eval": aside.eval, "about": aside.about, "rows": list(aside.rows)} for aside in self.asides],
        }


def make(entries: Sequence[Entry]) -> Report:
    """Return the figures of rows of any evals; the same question asked of the same model in the same way counts once.

    Raises:
        UsageError: a row that can't be read; none that is known.
    """
    found, rest = samples(entries)
    others, unknown = asides(rest)
    if not found and not others:
        raise UsageError("no row here is of an eval that a report knows: name what the --out of an eval was given")
    evals = dict.fromkeys(sample.eval for sample in found)
    scores = [Scores(name, [sample for sample in found if sample.eval == name]) for name in evals]
    notes = []
    known = len(entries) - len(unknown)
    if unknown:
        notes.append(
            f"{len(unknown):,} of {len(entries):,} rows are of no eval that a report knows: they are left out."
        )
    if twice := known - len(rest) + len(unknown) - len(found):
        notes.append(f"{twice:,} rows answer a question that another row answered before: they are left out.")
    if failed := sum(bool(sample.reason) for sample in found):
        notes.append(f"{failed:,} of {len(found):,} questions got no answer and count as wrong: see why below.")
    made_of: dict[tuple[str, str, Asked], set[str]] = {}
    for sample in found:
        made_of.setdefault((sample.eval, sample.task, sample.asked), set()).add(sample.made_of)
    for name in dict.fromkeys(key[0] for key, hashes in made_of.items() if len(hashes) > 1):
        notes.append(
            f"Questions of {name} were made of different texts, tokenizers or versions: their scores are mixed."
        )
    about = merged(entries)
    told = {name: value for name, value in about.items() if isinstance(value, str | int | float)}
    return Report(scores, others, told, notes)


def write(report: Report, folder: Path, tell: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write page and pictures into a folder, which is made if need be, and return the files, the page first.

    Without matplotlib the page has its tables alone, and says so.

    Args:
        report: from `make`.
        folder: where they go.
        tell: told what is being drawn.

    Raises:
        SaveError: a file can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"can't make {folder}: {error.strerror or error}") from error
    shown, files = [], []
    for scores in report.scores:
        tell(f"drawing {scores.eval}")
        section, drawn = _section(scores, report, folder)
        shown.append(section)
        files += drawn
    for aside in report.asides:
        tell(f"drawing {aside.eval}")
        shown.append(_beside(aside, drawn := [aside.draw(folder)] if available() else []))
        files += drawn
    notes = [*report.notes, *([] if available() else [NO_PICTURES])]
    text = page("What the model forgets", _asked(report), _facts(report.environment), notes, shown)
    put(folder / PAGE, text.encode("utf-8"))
    return [folder / PAGE, *files]


def _section(scores: Scores, report: Report, folder: Path) -> tuple[Section, list[Path]]:
    """Return what a page shows of one eval, and the pictures that were written."""
    about = ", ".join(str(report.environment[key]) for key in ("model", "device") if key in report.environment)
    files: list[Path] = []

    def drawn(heading: str, name: str, panels: Sequence[Panel]) -> list[Picture]:
        if not panels or not available():
            return []
        kept = panels[:_MOST_PANELS]
        file = folder / f"{scores.eval}-{name}.png"
        png(kept, f"{sections.title(scores)}: {heading.lower()}", about, file)
        files.append(file)
        return [Picture(svg(panel), "svg+xml", panel.alt) for panel in kept]

    parts: list[Part] = [*sections.overview(scores)]
    parts += [table for table in (sections.differences(scores), sections.failures(scores)) if table]
    what = scores.scale.name.capitalize()
    kinds = (
        (f"{what} against length", "length", sections.lengths(scores)),
        ("Needles by depth and length", "needles", sections.maps(scores)),
        (f"{what} against bytes kept", "bytes", sections.bytes_kept(scores)),
    )
    for heading, name, panels in kinds:
        if pictures := drawn(heading, name, panels):
            few = "" if len(pictures) == len(panels) else f" ({len(pictures)} of {len(panels)})"
            parts += [heading + few, pictures]
    if len(scores.tasks) > 1:
        tables = [sections.by_tasks(scores, who) for who in scores.names]
        if len(tables) == 1:
            parts += ["Tasks", *tables]
        else:
            parts += [
                "Tasks",
                *(Fold(name, [table]) for name, table in zip(scores.names.values(), tables, strict=True)),
            ]
        if pictures := drawn("Tasks against length", "tasks", sections.single_tasks(scores)):
            parts.append(Fold("Pictures of the tasks", [pictures]))
    details = ((name, table) for name, table in _details(scores) if table is not None)
    parts += [Fold(name, [table]) for name, table in details]
    return Section(sections.title(scores), sections.counted(scores), parts), files


def _details(scores: Scores) -> list[tuple[str, Table | None]]:
    return [("Bytes kept", sections.kept(scores)), ("Answers that scored least", sections.worst(scores))]


def _beside(aside: Aside, files: Sequence[Path]) -> Section:
    rows = [(line[0], [Value(text) for text in line[1:]]) for line in aside.lines]
    table = Table(f"longspan eval {aside.eval}", [title.lstrip(">") for title in aside.columns], rows)
    alt = f"Picture of longspan eval {aside.eval}: the figures are those of the table."
    pictures = [Picture(file.read_bytes(), "png", alt) for file in files]
    return Section(aside.name, aside.about, [table, *([pictures] if pictures else [])])


def _asked(report: Report) -> str:
    names = [scores.eval for scores in report.scores] + [aside.eval for aside in report.asides]
    return f"longspan eval {', '.join(dict.fromkeys(names))}. Intervals are 95 %, by bootstrap over the questions."


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    first = [name for name in ("model", "attention", "device") if name in environment]
    names = first + [name for name in environment if name not in first]
    return [(name, str(environment[name])) for name in names]


def _differences(scores: Scores) -> list[dict[str, Any]]:
    first, scale = next(iter(scores.names.values())), scores.scale
    found = []
    for (who, length), between in scores.differences().items():
        ends = {"difference": between.mean, "low": between.low, "high": between.high}
        told = {name: round(scale.difference(value), scale.digits) for name, value in ends.items()}
        line = {"eval": scores.eval, **who._asdict(), "to": first, "length": length, "questions": between.count}
        found.append({**line, **told})
    return found
