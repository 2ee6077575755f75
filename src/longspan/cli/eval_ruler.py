"""`longspan eval ruler`: 13 tasks that ask more of a long context than finding one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import eval_run
from longspan.cli.eval_options import Shared
from longspan.cli.progress import Progress

if TYPE_CHECKING:
    from longspan.evals.questions.sources import Sources

EXAMPLE = "longspan eval ruler --lengths 4K,8K --tasks vt,cwe --questions 10 --attention quest --out found"


def ruler(
    *,
    given: Shared,
    qa: Annotated[
        list[str] | None,
        typer.Option(
            "--qa",
            metavar="FILE",
            help="Questions for qa_1 (JSON in the form of SQuAD) or qa_2 (HotpotQA). Default: Longspan's own.",
        ),
    ] = None,
) -> None:
    """Ask RULER's 13 tasks: needles, variable tracking, word counts, questions among documents (arXiv 2404.06654).

    Contexts are read before their question is known. Scores have 95 % intervals.
    """
    from longspan.evals.questions.registry import evaluation

    def sources(progress: Progress) -> Sources:
        from longspan.evals.questions import passages
        from longspan.evals.questions.sources import Sources

        found = dict(passages.read(Path(name)) for name in qa or [])
        single, hops = passages.shipped()
        essay = eval_run.essay(given, progress)
        return Sources(essay, found.get("qa_1", single), found.get("qa_2", hops))

    eval_run.run(evaluation("ruler"), given, sources)
