"""`longspan eval compress`: what keeping fewer bytes of a context costs, ours beside a peer's."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli import eval_report, options, output, work
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, UsageError
from longspan.lengths import lengths_of

EXAMPLE = "longspan eval compress --ratios 2,4,8 --ways 'snapkv int4 snapkv+int4' --out found"

_TASKS = "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multivalue,niah_multiquery,fwe"


def compress(
    doc: options.Documents = None,
    model: options.Model = None,
    adapter: options.Adapter = None,
    ratios: Annotated[
        str, typer.Option("--ratios", metavar="N,N", help="Dense's bytes over those that may be kept.")
    ] = "2,4,8,16",
    ways: Annotated[
        str,
        typer.Option(
            "--ways", metavar="NAMES", help="Mechanisms, formats, or both as snapkv+int4; spaces between; or all."
        ),
    ] = "all",
    peer: Annotated[str | None, typer.Option("--peer", metavar="NAME", help="Measured beside ours: kvpress.")] = None,
    peer_python: Annotated[
        str | None,
        typer.Option("--peer-python", metavar="FILE", help="The interpreter that the peer is installed for."),
    ] = None,
    peer_model: Annotated[
        str | None, typer.Option("--peer-model", metavar="FOLDER", help="What the peer loads. Default: the same model.")
    ] = None,
    peer_jobs: Annotated[
        int, typer.Option("--peer-jobs", metavar="N", help="Copies of the peer that work side by side.")
    ] = 1,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", help="Processes that measure ours side by side.")] = 1,
    presses: Annotated[
        str, typer.Option("--presses", metavar="NAMES", help="The peer's methods, spaces between; or all.")
    ] = "all",
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAMES", help="Tasks of RULER, commas between.")] = _TASKS,
    length: Annotated[str, typer.Option("--length", metavar="N", help="Tokens of context.")] = "4K",
    questions: Annotated[int, typer.Option("--questions", metavar="N", help="Questions of each task.")] = 4,
    texts: Annotated[int, typer.Option("--texts", metavar="N", help="Pieces of prose for perplexity.")] = 2,
    following: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens after each that are scored.")] = 128,
    greedy: Annotated[int, typer.Option("--greedy", metavar="N", help="Tokens of dense's own that are compared.")] = 64,
    answer: Annotated[
        int, typer.Option("--answer", metavar="N", help="Tokens of an answer, where a task allows more.")
    ] = 128,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which questions.")] = 0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="Begin nothing more after that time.")
    ] = None,
    device: options.Device = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Keep rows and a report here; a run that was stopped goes on."),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Compare ways to keep fewer bytes: RULER's tasks, perplexity, agreement with dense, at equal bytes.

    Contexts are read before their question is known. Without --doc the prose is the Python language reference.
    """
    (tokens,) = lengths_of(length)[:1]
    wanted = _ratios(ratios)
    if min(questions, texts, following, greedy, answer) < 1 or following < 2:
        raise UsageError("--questions, --texts, --greedy and --answer need at least 1, --tokens at least 2")
    if min(jobs, peer_jobs) < 1 or (minutes is not None and not minutes > 0):
        raise UsageError("--jobs and --peer-jobs need at least 1, and --minutes more than 0")
    if peer is not None and peer_python is None:
        raise UsageError(f"--peer {peer} runs in an environment of its own: name its interpreter with --peer-python")
    if peer is not None and adapter is not None:
        raise UsageError(f"--peer {peer} loads a model without adapters: leave out --peer or --adapter")
    with Progress() as progress, contextlib.ExitStack() as stack:
        text = work.prose_of(doc, progress)
        from longspan.evals.compress import cases, folder_of
        from longspan.evals.compress_report import COLUMNS, table
        from longspan.evals.compress_run import PRESSES, WAYS, Given, run
        from longspan.evals.compress_work import Copy
        from longspan.evals.environment import environment
        from longspan.evals.journal import in_folder
        from longspan.evals.questions.making import named
        from longspan.evals.ruler.tasks import RULER
        from longspan.peers.process import Peer

        names = named(RULER, tasks)
        journal = stack.enter_context(in_folder(out, "compress.jsonl"))
        llm = work.load(model, None, device, progress, adapter=adapter)
        where, dtype = llm.model.device, str(llm.model.dtype).removeprefix("torch.")
        about = environment(where, "eval compress", sys.argv[3:]) | {"model": llm.model.name, "dtype": dtype}
        about["command"] = about["command"].replace("python -m", "longspan", 1)
        copies = [stack.enter_context(Copy(llm.model.name, str(where), dtype, adapter)) for _ in range(jobs - 1)]
        peers = []
        if peer is not None and peer_python is not None:
            folder = folder_of(llm.model) if peer_model is None else Path(peer_model)
            progress.busy(f"starting {peer}")
            for _ in range(peer_jobs):
                peers.append(stack.enter_context(Peer(peer, Path(peer_python), folder, [dtype, str(where)])))
        progress.busy("making questions")
        asked = cases(llm.model, text, tokens, names, questions, texts, following, seed=seed, longest_answer=answer)
        of = {
            "model": llm.model.fingerprint, "dtype": dtype, "length": tokens, "tasks": names, "questions": questions,
            "texts": texts, "tokens": following, "greedy": greedy, "answer": answer, "seed": seed,
            "version": RULER.version,
        }  # fmt: skip
        given = Given(
            WAYS if ways.strip() == "all" else ways.split(),
            PRESSES.get(peer or "", ()) if presses.strip() == "all" else presses.split(),
            wanted, tokens, greedy, of, minutes,
        )  # fmt: skip
        if peers:
            about[peers[0].name] = peers[0].about
        journal.begin(about)
        try:
            rows = [asdict(row) for row in run(llm.model, peers, given, asked, journal, progress.say, copies)]
        except (KeyboardInterrupt, Cancelled) as error:
            again = f"the same command goes on from {out}" if out else "nothing is kept without --out FOLDER"
            raise Cancelled(f"stopped: {again}") from error
        files = [] if out is None else eval_report.end(Path(out), progress)
    if json:
        output.write_json({**about, "of": of, "rows": rows, "files": files})
        return
    shown = output.table(*COLUMNS)
    for line in table(rows):
        shown.add_row(*line)
    output.write_rich(shown)
    eval_report.tell(files)


def _ratios(text: str) -> list[float]:
    found: dict[float, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            ratio = float(part)
        except ValueError:
            ratio = 0.0
        if not 1 < ratio < float("inf"):
            raise UsageError(f"{part!r} is no ratio of bytes: write a number above 1, such as 4")
        found[ratio] = None
    if not found:
        raise UsageError("--ratios names none: write 2,4,8")
    return list(found)
