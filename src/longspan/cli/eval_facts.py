"""`longspan eval facts`: facts hidden in real prose, asked of one session one by one, with citations."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli import eval_report, options, output
from longspan.cli.progress import Progress
from longspan.errors import UsageError
from longspan.evals.facts import KINDS

EXAMPLE = 'longspan eval facts --lengths 4K,16K --mechanisms "streaming retrieval" --out facts.jsonl'


def facts(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES]", help="Files to merge (with --merge).")] = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    mechanisms: Annotated[
        str,
        typer.Option("--mechanisms", metavar="SPECS", help="Specifications with spaces between; auto: as ask chooses."),
    ] = "retrieval",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N", help="Tokens of a haystack, such as 4K,16K.")
    ] = "4K,16K",
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="NAMES", help=f"Kinds of facts, commas between: {', '.join(KINDS)}.")
    ] = "single",
    haystacks: Annotated[int, typer.Option("--haystacks", metavar="N", help="Haystacks; 8 questions each.")] = 5,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the first haystack.")] = 0,
    device: options.Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="float32, bfloat16 or float16. Default: float32 on a GPU, else what the CPU is best at.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE.jsonl",
            help="Append every answer here, and go on from what it holds; the report has a folder beside it.",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="Stop after the question asked at that time.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Ask nothing: make one result of the files named.")] = False,
    json: options.AsJson = False,
) -> None:
    """Hide facts in prose and ask a session for them: right answers, pages ranked first, facts cited.

    Eight facts stand in each haystack, which is read once; by mechanism and length. With --out, a run that was stopped
    goes on where it was.
    """
    if merge != bool(files):
        raise UsageError("--merge needs files: give --merge facts.jsonl" if merge else "files are for --merge alone")
    with Progress() as progress:
        progress.busy("reading haystacks and asking")
        from longspan.evals.needle import Options, measure

        given = Options(
            model=model,
            device=device,
            mechanisms=mechanisms,
            lengths=lengths,
            kinds=kinds,
            haystacks=haystacks,
            seed=seed,
            dtype=dtype,
            out=None if out is None else Path(out),
            minutes=minutes,
            merge=[Path(name) for name in files or []] or None,
            adapter=adapter,
        )
        result = measure(given, f"longspan eval facts {shlex.join(sys.argv[3:])}", progress.say)
        # Its journal is a file, which has neighbours that are none of it: the report has a folder of its own.
        home = None if out is None else Path(out).with_name(f"{Path(out).stem}-report")
        files = [] if out is None else eval_report.end(Path(out), progress, home)
    if json:
        output.write_json({**result, "files": files})
        return
    columns = ("mechanism", "kind", "length", "questions", "right", "own_words", "ranked_first", "cited")
    shown = output.table(*columns[:2], *(f">{name.replace('_', ' ')}" for name in columns[2:]))
    for line in result["table"]:
        shown.add_row(*(str(line[name]) for name in columns))
    output.write_rich(shown)
    eval_report.tell(files)
