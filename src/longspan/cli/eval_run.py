"""One eval of generated questions from the command line: who is asked, the run, the table.

It does not know the evals' own options: commands give it an eval and what its questions are made of.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.cli import eval_endpoint, eval_options, eval_report, output, work
from longspan.cli.eval_options import Shared
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, EndpointError, UsageError
from longspan.lengths import bytes_of, lengths_of

if TYPE_CHECKING:
    from longspan.attention import Mechanism
    from longspan.engine.llm import LLM
    from longspan.evals.asking.asker import Asker, Tick
    from longspan.evals.journal import Entry
    from longspan.evals.questions.example import Eval
    from longspan.evals.questions.sources import Sources


@dataclass(frozen=True)
class _Askers:
    """Who is asked."""

    at: Callable[[int], Sequence[Asker]]
    """Returns the askers at a length."""
    about: dict[str, Any]
    """Where they run, with which versions: for the environment."""
    notes: list[str]
    """What the user should know of them."""
    close: Callable[[], None] = lambda: None
    """Ends what they still do."""


def run(
    evaluation: Eval,
    given: Shared,
    sources: Callable[[Progress], Sources] | None = None,
) -> None:
    """Ask what is asked for and show a table, or with --json one object.

    Args:
        evaluation: the eval.
        given: the command's shared options.
        sources: returns what questions are made of; None: the prose of --haystack.

    Raises:
        UsageError: an option that can't be used.
        Cancelled: Ctrl-C.
    """
    began, wanted = time.monotonic(), lengths_of(given.lengths)
    if given.questions < 1:
        raise UsageError(f"--questions {given.questions} leaves nothing to ask: give at least 1")
    if given.minutes is not None and not given.minutes > 0:
        raise UsageError(f"--minutes {given.minutes:g} leaves no time: give more than 0")
    eval_endpoint.check(given)
    part, parts = eval_options.shard_of(given.shard)
    until = math.inf if given.minutes is None else began + 60 * given.minutes
    again = f"the same command goes on from {given.out}" if given.out else "nothing is kept without --out FOLDER"
    with Progress() as progress:
        from longspan.evals.asking import rows, tables
        from longspan.evals.asking import run as running
        from longspan.evals.journal import in_folder
        from longspan.evals.questions.making import named
        from longspan.evals.questions.setup import Setup

        setup = Setup(given.question, given.order, given.context)
        tasks = named(evaluation, given.tasks)
        setup.check(evaluation, tasks)
        if given.base_url is not None and any(evaluation.tasks[task].scoring == "probability" for task in tasks):
            raise UsageError(
                f"{evaluation.name} measures the probability of a text, which an endpoint does not give: leave out "
                "--base-url to ask a model that runs here"
            )
        made_of = sources(progress) if sources else prose(given, progress)
        what = running.Given(evaluation, tasks, wanted, given.questions, given.seed, made_of, setup)
        file = evaluation.name + (f"-{part + 1}of{parts}" if parts > 1 else "") + ".jsonl"
        with in_folder(given.out, file) as journal:
            elsewhere = _elsewhere(given.out, evaluation, file)
            rows.answered([*journal.entries, *elsewhere])  # a file of another eval is refused before a model is loaded
            askers = _engines(given, progress) if given.base_url is None else _endpoint(given, progress)
            for note in askers.notes:
                progress.say(f"note: {note}")
            asked = running.plan(what, askers.at)
            mine = asked[part::parts]
            about = {**askers.about, "eval": evaluation.name, "seed": given.seed}

            def reading(told: str) -> Tick:
                return lambda done, total: progress(told, done, total)

            try:
                left = running.run(what, mine, journal, about, progress.say, reading, elsewhere=elsewhere, until=until)
            except (KeyboardInterrupt, Cancelled) as error:
                raise Cancelled(f"stopped: {again}") from error
            except EndpointError as error:
                raise EndpointError(f"{error}; {again}") from error
            finally:
                askers.close()
            if left:
                progress.say(
                    f"stopped after {given.minutes:g} minutes with {left} of {len(mine)} questions left: {again}"
                )
            done = rows.answered([*journal.entries, *elsewhere])
        result = tables.summary([done[each.key] for each in asked if each.key in done])
        files = [] if given.out is None or not result["rows"] else eval_report.end(Path(given.out), progress)
    if given.json:
        output.write_json({**result, "files": files})
        return
    _show(result["table"], evaluation)
    eval_report.tell(files)


def prose(given: Shared, progress: Progress) -> Sources:
    """Return the prose of --haystack for questions to be made of."""
    from longspan.evals.questions.sources import Sources

    return Sources(essay(given, progress))


def essay(given: Shared, progress: Progress) -> str | None:
    """Return the text of --haystack; None: the user named none."""
    if not given.haystack:
        return None
    return "\n\n".join(document.text for document in work.read_files(given.haystack, progress).documents)


def _engines(given: Shared, progress: Progress) -> _Askers:
    """Return askers around a model that is loaded here."""
    from longspan.evals.arguments import specs_of
    from longspan.evals.asking.engines import Engines, Way, choosing, ways
    from longspan.evals.environment import environment
    from longspan.hf import adapter as adapters

    if given.mechanisms is not None and given.attention is not None:
        raise UsageError("--mechanisms names several ways to attend in place of --attention: give one of the two")
    every = given.mechanisms is not None and given.mechanisms.strip() == "all"
    budgets = [] if given.budgets is None else eval_options.shares_of(given.budgets)
    if every:
        found = ways(["dense", *choosing()], budgets)
    elif given.mechanisms is not None or (given.attention is not None and budgets):
        found = ways(specs_of(given.mechanisms or given.attention or ""), budgets)
    elif budgets:
        raise UsageError("--budgets are shares for a mechanism: name one with --attention or --mechanisms")
    else:
        # As everywhere, an adapter attends by what it was trained for unless told otherwise.
        taught = None if given.adapter is None else adapters.read(given.adapter).attention
        found = [Way(given.attention or taught or "")]
    limit = None if given.kv_budget is None else bytes_of(given.kv_budget)
    first = work.load(
        given.model, found[0].spec or None, given.device, progress, prefill=given.prefill, kv=given.kv,
        kv_budget=given.kv_budget, dtype=given.dtype, adapter=given.adapter,
    )  # fmt: skip

    def make(mechanism: Mechanism | None) -> LLM:
        return type(first)(
            first.model, mechanism, prefill=given.prefill, kv=given.kv, kv_budget=limit, say=progress.say
        )

    trained = first.model.trained
    notes = [note for way in found if way.spec for note in trained.lacks(_parsed(way.spec), first.model.name)]
    about = environment(first.model.device, f"eval {sys.argv[2] if len(sys.argv) > 2 else ''}", sys.argv[3:])
    about["command"] = about["command"].replace("python -m", "longspan", 1)
    about |= {"model": first.model.name, "dtype": str(first.model.dtype).removeprefix("torch.")}
    return _Askers(Engines(make, found, given.kv, progress.say if every else None).at, about, notes)


def _endpoint(given: Shared, progress: Progress) -> _Askers:
    """Return one asker, a model of an endpoint."""
    client, asker, about, notes = eval_endpoint.endpoint(given, progress)
    about["command"] = f"longspan eval {shlex.join(sys.argv[2:])}"
    return _Askers(lambda _: [asker], about, notes, client.close)


def _parsed(spec: str) -> Mechanism:
    from longspan.attention import parse

    return parse(spec)


def _elsewhere(folder: str | None, evaluation: Eval, own: str) -> list[Entry]:
    """Return the rows of an eval's other journals in the folder: those of other shards."""
    from longspan.evals.journal import read

    if folder is None:
        return []
    files = [file for file in sorted(Path(folder).glob(f"{evaluation.name}*.jsonl")) if file.name != own]
    return [entry for file in files for entry in read(file)]


def _show(lines: list[dict[str, Any]], evaluation: Eval) -> None:
    from longspan.evals.asking.tables import cells

    columns, found = cells(lines)
    several = len({line[0] for line in found}) > 1
    shown = output.table(*(["attention"] if several else []), "task", *(f">{length:,} tokens" for length in columns))
    for line in found:
        shown.add_row(*line[0 if several else 1 :])
    output.write_rich(shown)
    counts = {line["questions"] for line in lines if line["task"] != "average"}
    least, most = min(counts, default=0), max(counts, default=0)
    counted = output.counted(most, "question") if least == most else f"{least} to {most} questions"
    kind = "perplexities" if any("perplexity" in line for line in lines) else "scores in percent"
    output.say(f"{kind}, with 95 % intervals; {counted} of each task at each length")
