"""`longspan eval`: what a model forgets, and what reading less costs."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import eval_compress, eval_facts, eval_options, eval_report, eval_tasks, options, output, work
from longspan.cli.progress import Progress
from longspan.errors import UsageError
from longspan.lengths import lengths_of

if TYPE_CHECKING:
    from longspan.engine.llm import LLM

_EXAMPLE = 'longspan eval compare --doc manual.md --mechanisms "quest tree" --budgets 1/4,1/8'


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    evals = typer.Typer(
        no_args_is_help=False,
        invoke_without_command=True,
        callback=_eval,
        help="Measure what a model forgets, and what reading less costs.",
        epilog=f"Example: {_EXAMPLE}",
        rich_markup_mode=None,
    )
    evals.command("compare", epilog=f"Example: {_EXAMPLE}")(compare)
    evals.command("compress", epilog=f"Example: {eval_compress.EXAMPLE}")(eval_compress.compress)
    evals.command("facts", epilog=f"Example: {eval_facts.EXAMPLE}")(eval_facts.facts)
    for name, (command, example) in eval_tasks.COMMANDS.items():
        evals.command(name, epilog=f"Example: {example}")(eval_options.shared(command))
    evals.command("report", epilog=f"Example: {eval_report.EXAMPLE}")(eval_report.report)
    app.add_typer(evals, name="eval")


def _eval(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        output.write(context.get_help().rstrip() + "\n")


def compare(
    doc: options.Documents = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    mechanisms: Annotated[
        str,
        typer.Option("--mechanisms", metavar="SPECS", help="Specifications with spaces between, or all that choose."),
    ] = "all",
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="SHARES", help="Shares of the context's keys that a query may read.")
    ] = "1/2,1/4,1/8,1/16",
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,N", help="Tokens of context, such as 2K,4K.")] = "4K",
    prefill: options.Prefill = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens whose perplexity is measured.")] = 128,
    greedy: Annotated[int, typer.Option("--greedy", metavar="N", help="Greedy tokens that are compared.")] = 64,
    haystacks: Annotated[int, typer.Option("--haystacks", metavar="N", help="Haystacks of 8 needles each.")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which haystacks.")] = 0,
    device: options.Device = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Keep rows and a report here; a run that was stopped goes on."),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Compare mechanisms side by side: perplexity, agreement with dense, needles, keys read, decode speed.

    Without --doc the text is the Python language reference, which every Python has.
    """
    shares, wanted = eval_options.shares_of(budgets), lengths_of(lengths)
    if min(tokens, greedy) < 2 or haystacks < 1:
        raise UsageError("--tokens and --greedy need at least 2, --haystacks at least 1")
    with Progress() as progress:
        text = work.prose_of(doc, progress)
        from longspan.attention import parse
        from longspan.evals.arguments import specs_of
        from longspan.evals.asking.engines import choosing
        from longspan.evals.compare import Row, Task, measure
        from longspan.evals.compare_report import COLUMNS, table
        from longspan.evals.environment import environment
        from longspan.evals.journal import in_folder

        every = mechanisms.strip() == "all"
        specs = list(choosing()) if every else specs_of(mechanisms)
        read_by = None if prefill is None else parse(prefill)
        llm = work.load(model, None, device, progress, adapter=adapter)
        for spec in specs:
            for note in llm.model.trained.lacks(parse(spec), llm.model.name):
                progress.say(f"note: {note}")
        about = environment(llm.model.device, "eval compare", sys.argv[3:]) | {"model": llm.model.name}
        about["command"] = about["command"].replace("python -m", "longspan", 1)
        tell = progress.busy if sys.stderr.isatty() else progress.say
        rows: list[dict[str, Any]] = []
        with in_folder(out, "rows.jsonl") as journal:
            journal.begin(about)
            for length in wanted:
                task = Task(length, _tokens(llm, text, length + tokens), haystacks, greedy, seed)
                same = asdict(replace(task, tokens=[])) | {
                    "perplexity_tokens": tokens,
                    "prefill": prefill or "dense",
                    "model": llm.model.fingerprint,
                }
                mine = [entry.row for entry in journal.entries if entry.row["task"] == same]
                known = [Row(**row["row"]) for row in mine]
                for row in measure(llm, specs, shares, task, read_by, known, tell, progress.say if every else None):
                    journal.append({"task": same, "row": asdict(row)})
                    mine.append({"row": asdict(row)})
                rows += [each["row"] for each in mine]
        files = [] if out is None else eval_report.end(Path(out), progress)
    if json:
        output.write_json({**about, "rows": rows, "files": files})
        return
    shown = output.table(*COLUMNS)
    for line in table(rows):
        shown.add_row(*line)
    output.write_rich(shown)
    eval_report.tell(files)


def _tokens(llm: LLM, text: str, count: int) -> list[int]:
    """Return the first `count` tokens of a text (UsageError: it has fewer)."""
    tokens = llm.model.tokens(text[: count * 12])[:count]
    if len(tokens) < count:
        raise UsageError(
            f"the text has {len(tokens)} tokens but {count} are needed: give more with --doc, or less --lengths"
        )
    return tokens
