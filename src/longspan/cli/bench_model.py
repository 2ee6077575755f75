"""`longspan bench model`: prefill and decode of a whole model, beside plain transformers and llama.cpp."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan.cli import options, output
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, UsageError
from longspan.lengths import lengths_of, tokens_of

if TYPE_CHECKING:
    from longspan.bench.long.run import Asked
    from longspan.hf.model import CausalModel

EXAMPLE = (
    "longspan bench model --model nemotron-3-nano-30b --random-weights --context 64K,1M --attention superlinear,dense"
)
_JOURNAL = "model.jsonl"


def model(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES]", help="Files to merge (with --merge).")] = None,
    model: options.Model = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="N,N", help="Tokens of context: prefill, decode and memory of one model at each."
        ),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            "--attention", "-a", metavar="SPECS", help="With --context; with options, put spaces between them."
        ),
    ] = "superlinear,dense",
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="With --context: weights drawn on the device, of the model's shape."),
    ] = False,
    peers: Annotated[
        str, typer.Option("--peers", metavar="NAMES", help="With --context: transformers; empty: nobody.")
    ] = "",
    whole: Annotated[
        str,
        typer.Option("--whole", metavar="N", help="With --context: read contexts up to N tokens whole, not in parts."),
    ] = "1M",
    profile: Annotated[
        bool, typer.Option("--profile", help="With --context: tell the kernels that take most.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="With --context: which weights and tokens.")] = 0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="With --context: begin no further row after that.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="With --context: keep rows here; the same command goes on."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Measure nothing: make one result of the files named.")
    ] = False,
    mechanisms: Annotated[
        str, typer.Option("--mechanisms", metavar="SPECS", help="Specifications with spaces between.")
    ] = "dense streaming superlinear retrieval",
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,N", help="Tokens of text.")] = "1K,4K,8000",
    prefill: options.Prefill = None,
    weights: options.Weights = "auto",
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="TYPE", help="float32, bfloat16 or float16. Default: what the device is best at."
        ),
    ] = None,
    peer_python: Annotated[
        str | None, typer.Option("--peer-python", metavar="FILE", help="An interpreter that has llama-cpp-python.")
    ] = None,
    peer_model: Annotated[
        str | None, typer.Option("--peer-model", metavar="FILE.gguf", help="What llama.cpp loads.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of which medians are taken.")] = 3,
    json: options.AsJson = False,
) -> None:
    """Measure tokens a second of a whole model; logits are compared first.

    With --context: time to first token, prefill, decode and memory at long contexts, by our own forward. Otherwise the
    engine beside plain transformers (and llama.cpp) in turns, on a text.
    """
    if merge != bool(files):
        raise UsageError("--merge needs files: give --merge model.jsonl" if merge else "files are for --merge alone")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes {minutes:g} leaves no time: give more than 0")
    if context is not None and adapter is not None:
        raise UsageError("--context measures decode steps that search by the query itself: leave out --adapter")
    if context is None and not merge:
        alone = {"--random-weights": random_weights, "--peers": peers, "--profile": profile, "--out": out}
        if named := [name for name, value in {**alone, "--minutes": minutes}.items() if value]:
            raise UsageError(f"{named[0]} is for long contexts: give --context 64K as well")
    with Progress() as progress:
        progress.busy("loading torch")
        if merge or context is not None:
            given = {"contexts": context, "attention": attention, "peers": peers, "whole": whole, "profile": profile}
            found = _long(
                files, given | {"seed": seed}, progress,
                model=model, random=random_weights, device=device, dtype=dtype, minutes=minutes, out=out,
            )  # fmt: skip
        else:
            from longspan.bench.model import Options, run

            found = run(
                Options(
                    model=model,
                    device=device,
                    mechanisms=mechanisms,
                    lengths=lengths,
                    dtype=dtype,
                    prefill=prefill,
                    weights=weights,
                    adapter=adapter,
                    peer_python=None if peer_python is None else Path(peer_python),
                    peer_model=None if peer_model is None else Path(peer_model),
                    repeats=repeats,
                ),
                f"longspan bench model {shlex.join(sys.argv[3:])}",
                progress.say,
            )
    if json:
        output.write_json(found)
    elif merge or context is not None:
        from longspan.bench.long import report

        shown = output.table(*report.COLUMNS)
        for line in report.table(found["rows"]):
            shown.add_row(*line)
        output.write_rich(shown)
        output.write("".join(f"{sentence}\n" for sentence in report.sentences(found)))
    else:
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
        shown = output.table(columns[0], *(f">{name.replace('_', ' ')}" for name in columns[1:]))
        for row in found["rows"]:
            shown.add_row(*(str(row.get(name, "")) for name in columns))
        output.write_rich(shown)


def _long(
    files: list[str] | None,
    given: dict[str, Any],
    progress: Progress,
    *,
    model: str | None,
    random: bool,
    device: str,
    dtype: str | None,
    minutes: float | None,
    out: str | None,
) -> dict[str, Any]:
    """Measure at long contexts, or merge what was measured."""
    began = time.monotonic()
    from longspan.bench.attention.run import versions
    from longspan.bench.long import report, run
    from longspan.cli.bench_attention import _again
    from longspan.evals.environment import environment
    from longspan.evals.journal import in_folder, read

    if files:
        return report.result([entry for name in files for entry in read(Path(name))])
    mechanisms = _mechanisms(given["attention"])
    progress.busy("making the model")
    made = _model(model, random, device, dtype, given["seed"], progress)
    about = environment(made.device, "bench model", sys.argv[3:]) | versions(made.device)
    about["command"] = f"longspan bench model {shlex.join(_again(sys.argv[3:]))}"
    asked = _asked(given, mechanisms, made, about["device"])
    with in_folder(out, _JOURNAL) as journal:
        journal.begin(about)
        again = f"the same command goes on from {out}" if out else "nothing is kept without --out FOLDER"
        until = None if minutes is None else began + 60 * minutes
        try:
            late = lambda: until is not None and time.monotonic() > until  # noqa: E731
            left = run.run(made, asked, journal, late, progress.say, progress.busy)
        except (KeyboardInterrupt, Cancelled) as error:
            raise Cancelled(f"stopped: {again}") from error
        if left:
            progress.say(f"stopped after {minutes:g} minutes without {', '.join(left)}: {again}")
        return report.result(run.entries_of(asked, journal))


def _model(
    name: str | None, random: bool, device: str, dtype: str | None, seed: int, progress: Progress
) -> CausalModel:
    """Return a model that runs by its native forward (UsageError: there is none)."""
    from longspan import settings
    from longspan.evals.arguments import dtype_of
    from longspan.hf.loading import load
    from longspan.hf.model import CausalModel
    from longspan.hf.random_weights import random_model

    name, kind = name or settings.default_model(), None if dtype is None else dtype_of(dtype)
    if random:
        made = random_model(name, device=device, dtype=kind, seed=seed, native=True)
    else:
        loaded = load(name, device=device, dtype=kind, say=progress.say)
        made = CausalModel(loaded.name, loaded.model, loaded.tokenizer, native=True)
    if made.native is None:
        raise UsageError(f"{name} has no forward of our own: leave out --context, and give --lengths")
    return made


def _mechanisms(text: str) -> tuple[Any, ...]:
    """Return the ways of attending that are named: with commas between, or spaces where there are options."""
    from longspan.attention import parse

    parts = text.split() if ":" in text else text.replace(",", " ").split()
    return tuple(parse(part) for part in dict.fromkeys(parts))


def _asked(given: dict[str, Any], mechanisms: tuple[Any, ...], made: CausalModel, where: str) -> Asked:
    from longspan.bench.long.run import Asked

    return Asked(
        contexts=tuple(lengths_of(given["contexts"])),
        mechanisms=mechanisms,
        peers=tuple(dict.fromkeys(filter(None, (part.strip() for part in given["peers"].split(","))))),
        whole=tokens_of(given["whole"]),
        seed=given["seed"],
        profile=given["profile"],
        of={
            "model": made.name,
            "dtype": str(made.dtype).removeprefix("torch."),
            "device": where,
            "seed": given["seed"],
        },
    )
