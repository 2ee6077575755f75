"""`longspan eval ruler`: 13 tasks that ask more of a long context than finding one sentence."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli import options, output, work
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, UsageError
from longspan.lengths import lengths_of

if TYPE_CHECKING:
    from longspan.evals.ruler.asking import Tick
    from longspan.evals.ruler.rows import Key
    from longspan.evals.ruler.sources import Sources

EXAMPLE = "longspan eval ruler --lengths 4K,8K --tasks vt,cwe --questions 10 --attention quest --out found"


def ruler(
    model: options.Model = None,
    attention: options.Attention = None,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Tasks with commas between, such as vt,cwe; or all 13.")
    ] = "all",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N", help="Tokens of prompt and answer together, such as 4K,8K.")
    ] = "4K",
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Questions of each task at each length.")
    ] = 5,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which questions.")] = 0,
    prefill: options.Prefill = None,
    kv: options.KVFormat = "auto",
    kv_budget: options.KVBudget = None,
    haystack: Annotated[
        list[str] | None,
        typer.Option(
            "--haystack",
            metavar="PATH",
            help="Prose to hide needles in: a file or a folder; may be given several times. "
            "Default: the Python language reference.",
        ),
    ] = None,
    qa: Annotated[
        list[str] | None,
        typer.Option(
            "--qa",
            metavar="FILE",
            help="Questions for qa_1 (JSON in the form of SQuAD) or qa_2 (HotpotQA). Default: Longspan's own.",
        ),
    ] = None,
    device: options.Device = "auto",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Keep answers and a picture here; a run that was stopped goes on."
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Ask RULER's 13 tasks: needles, variable tracking, word counts, questions among documents (arXiv 2404.06654).

    Contexts are read before their question is known. Scores have 95 % intervals.
    """
    wanted = lengths_of(lengths)
    if questions < 1:
        raise UsageError(f"--questions {questions} leaves nothing to ask: give at least 1")
    with Progress() as progress:
        from longspan.evals.environment import environment
        from longspan.evals.journal import in_folder
        from longspan.evals.ruler import rows
        from longspan.evals.ruler.picture import picture
        from longspan.evals.ruler.run import Given, plan, run
        from longspan.evals.ruler.tasks import named

        given = Given(named(tasks), wanted, questions, seed, _sources(haystack, qa, progress), kv)
        with in_folder(out, "ruler.jsonl") as journal:
            rows.answered(journal.entries)  # a file of another eval is refused before a model is loaded
            llm = work.load(model, attention, device, progress, prefill=prefill, kv=kv, kv_budget=kv_budget)
            about = environment(llm.model.device, "eval ruler", sys.argv[3:])
            about["command"] = about["command"].replace("python -m", "longspan", 1)
            keys = plan(llm, given)
            about |= {"model": llm.model.name, "attention": keys[0].attention, "seed": seed}
            for note in llm.model.trained.lacks(llm.attention, llm.model.name):
                progress.say(f"note: {note}")

            def reading(what: str) -> Tick:
                return lambda done, total: progress(what, done, total)

            try:
                run(llm, keys, given.sources, journal, about, progress.say, reading)
            except (KeyboardInterrupt, Cancelled) as error:
                again = f"the same command goes on from {out}" if out else "nothing is kept without --out FOLDER"
                raise Cancelled(f"stopped: {again}") from error
            done = rows.answered(journal.entries)
            result = rows.summary([done[key] for key in keys])
        pictures = []
        if out is not None:
            file = Path(out) / ("ruler-" + re.sub(r"[^\w.=]+", "-", _how(keys[0])) + ".png")
            told = f"{Path(llm.model.name).name}, {_how(keys[0])}, {about['device']}"
            picture(result["table"], told, file)
            pictures.append(str(file))
    if json:
        output.write_json({**result, "pictures": pictures})
        return
    columns, lines = rows.cells(result["table"])
    shown = output.table("task", *(f">{length:,} tokens" for length in columns))
    for line in lines:
        shown.add_row(*line)
    output.write_rich(shown)
    counted = output.counted(questions, "question")
    output.say(f"scores in percent, with 95 % intervals; {counted} of each task at each length")
    for name in pictures:
        output.say(f"picture: {name}")


def _how(key: Key) -> str:
    """Return how contexts are read and kept, as far as it was asked for."""
    parts = {"prefill": key.prefill, "kv": key.kv.removeprefix("auto"), "kv-budget": str(key.kv_budget or "")}
    return " ".join([key.attention, *(f"{name} {value}" for name, value in parts.items() if value)])


def _sources(haystack: list[str] | None, qa: list[str] | None, progress: Progress) -> Sources:
    """Return what haystacks and questions are made of."""
    from longspan.evals.ruler import passages
    from longspan.evals.ruler.sources import Sources

    found = dict(passages.read(Path(name)) for name in qa or [])
    single, hops = passages.shipped()
    essay = None
    if haystack:
        essay = "\n\n".join(document.text for document in work.read_files(haystack, progress).documents)
    return Sources(essay, found.get("qa_1", single), found.get("qa_2", hops))
