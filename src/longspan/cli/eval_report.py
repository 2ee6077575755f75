"""`longspan eval report`: what runs found, merged, as a table, a page and pictures. Every eval ends with the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options, output
from longspan.cli.progress import Progress

if TYPE_CHECKING:
    from longspan.evals.report.make import Report
    from longspan.evals.report.page import Table

EXAMPLE = "longspan eval report found/ other/ruler.jsonl --out comparison"


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders that --out of an eval named, or journals (*.jsonl).")
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Write report.html and pictures here. Default: where the only run is."
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Merge runs of any eval and show what they found: a table, a page for the browser, and pictures.

    The same question asked of the same model in the same way counts once. Intervals are 95 %, by bootstrap.
    """
    with Progress() as progress:
        progress.busy("reading the runs")
        from longspan.evals.report.make import make
        from longspan.evals.report.reading import entries

        paths = [Path(run) for run in runs]
        found = make(entries(paths, progress.say))
        folder = Path(out) if out is not None else _home(paths)
        files = write(found, folder, progress)
    if json:
        output.write_json({**found.told(), "files": files})
        return
    for note in found.notes:
        output.say(f"note: {note}")
    show(found)
    tell(files)


def end(run: Path, progress: Progress, folder: Path | None = None) -> list[str]:
    """Write the report of a run, as every eval does at its end, and return the files.

    Args:
        run: a folder with journals, or one journal.
        progress: told what is being drawn.
        folder: where the report goes; None: to the run.

    Raises:
        SaveError: it can't be written.
    """
    from longspan.evals.report.make import make
    from longspan.evals.report.reading import entries

    return write(make(entries([run])), folder or run, progress)


def write(found: Report, folder: Path, progress: Progress) -> list[str]:
    """Write a report's files into a folder, and return them (SaveError: they can't be written)."""
    from longspan.evals.report.make import NO_PICTURES
    from longspan.evals.report.make import write as written

    files = [str(file) for file in written(found, folder, progress.busy)]
    if len(files) == 1:
        progress.say(f"note: {NO_PICTURES}")
    return files


def tell(files: Sequence[str]) -> None:
    """Say where a report is."""
    for file in files:
        output.say(f"{'report' if file.endswith('.html') else 'picture'}: {file}")


def show(found: Report) -> None:
    """Show a report's tables: whoever was asked, and single tasks where one was asked alone."""
    from longspan.evals.report import sections

    for scores in found.scores:
        only = next(iter(scores.names)) if len(scores.names) == 1 else None
        tables = sections.overview(scores) if only is None else [sections.by_tasks(scores, only)]
        for table in tables:
            _show(table.caption, _filled(table))
    for aside in found.asides:
        shown = output.table(*aside.columns)
        for line in aside.lines:
            shown.add_row(*line)
        _show(f"{aside.eval}: {aside.about}", shown)


def _show(caption: str, table: Any) -> None:
    output.write(f"{caption}\n\n")
    output.write_rich(table)
    output.write("\n")


def _filled(table: Table) -> Any:
    """Return a page's table for a terminal: an interval stands beside its figure."""
    shown = output.table(table.head[0], *(f">{name}" for name in table.head[1:]))
    for name, values in table.rows:
        shown.add_row(name, *(f"{value.text} ({value.below})" if value.below else value.text for value in values))
    return shown


def _home(runs: Sequence[Path]) -> Path:
    """Return where a report goes by itself: to the only run, or beside it; of several runs, into `report`."""
    if len(runs) > 1:
        return Path("report")
    return runs[0] if runs[0].is_dir() else runs[0].parent
