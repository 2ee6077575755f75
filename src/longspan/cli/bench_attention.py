"""`longspan bench attention`: one layer's attention at growing contexts, beside peers, outputs checked first."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longspan import specs
from longspan.cli import options, output
from longspan.cli.progress import Progress
from longspan.errors import Cancelled, UsageError
from longspan.lengths import lengths_of, tokens_of

if TYPE_CHECKING:
    from longspan.bench.attention.run import Asked
    from longspan.evals.journal import Journal

EXAMPLE = "longspan bench attention --mechanism superlinear --peers superlinear,sdpa --lengths 64K,256K,1M --json"
_JOURNAL = "attention.jsonl"


def attention(
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES]", help="Files to merge (with --merge).")] = None,
    mechanism: Annotated[str, typer.Option("--mechanism", metavar="SPEC", help="What is measured.")] = "superlinear",
    given_options: Annotated[
        str, typer.Option("--options", metavar="NAME=VALUE,...", help="The mechanism's options, such as gate=routed.")
    ] = "",
    peers: Annotated[
        str,
        typer.Option(
            "--peers",
            metavar="NAMES",
            help="Measured beside it: superlinear (PyPI's package), sdpa (PyTorch's cuDNN and flash); empty: none.",
        ),
    ] = "superlinear,sdpa",
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="N,N", help="Tokens of context. Default: 64K to 10M; 1K,2K,4K on a CPU."),
    ] = None,
    what: Annotated[
        str, typer.Option("--what", metavar="PARTS", help="decode, prefill and backward, commas between.")
    ] = "decode,prefill",
    heads: Annotated[int, typer.Option("--heads", metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", metavar="N", help="KV heads.")] = 2,
    head_dim: Annotated[int, typer.Option("--head-dim", metavar="N", help="Numbers of a head.")] = 128,
    chunk: Annotated[
        str | None,
        typer.Option(
            "--chunk", metavar="N", help="Queries of prefill, the context's last. Default: 32K; 512 on a CPU."
        ),
    ] = None,
    routing: Annotated[
        str,
        typer.Option(
            "--routing", metavar="HOW", help="random: the worst case; trained: neighbours choose neighbouring spans."
        ),
    ] = "random",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which inputs, and which rows are checked.")] = 0,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", help="Of measuring, for each side of each row.")
    ] = 1.0,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="Begin no further row after that time.")
    ] = None,
    device: options.Device = "auto",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Keep rows here as they come; the same command goes on."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Measure nothing: make one result of the files named.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Measure one layer's attention at growing contexts: time, ratios to peers, share of what the device can do.

    Outputs are compared with float64 on sampled rows first: there is no figure of a wrong one, and if ours is wrong the
    command fails. On a CPU small sizes run in float32.
    """
    if merge != bool(files):
        raise UsageError(
            "--merge needs files: give --merge attention.jsonl" if merge else "files are for --merge alone"
        )
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes {minutes:g} leaves no time: give more than 0")
    began = time.monotonic()
    with Progress() as progress:
        progress.busy("loading torch")
        from longspan.bench.attention import report
        from longspan.evals.journal import in_folder, read

        if merge:
            found = report.result([entry for name in files or [] for entry in read(Path(name))])
        else:
            asked = _asked(
                mechanism, given_options, peers, lengths, what, chunk, device,
                heads=heads, kv_heads=kv_heads, head_dim=head_dim, routing=routing, seed=seed, seconds=seconds,
            )  # fmt: skip
            from longspan.bench.attention.run import entries_of

            with in_folder(out, _JOURNAL) as journal:
                _measure(asked, journal, began, minutes, out, progress)
                found = report.result(entries_of(asked, journal))
    if json:
        output.write_json(found)
        return
    shown = output.table(*report.COLUMNS)
    for line in report.table(found["rows"]):
        shown.add_row(*line)
    output.write_rich(shown)
    output.write("".join(f"{sentence}\n" for sentence in report.sentences(found)))


def _asked(
    mechanism: str,
    given_options: str,
    peers: str,
    lengths: str | None,
    what: str,
    chunk: str | None,
    device: str,
    **others: Any,
) -> Asked:
    """Return what is to be measured (UsageError: an option that can't be used)."""
    import torch

    from longspan.attention import make
    from longspan.bench.attention.run import Asked
    from longspan.evals.environment import environment
    from longspan.hf.loading import pick_device

    name, own = specs.split(f"{mechanism}{',' if ':' in mechanism else ':'}{given_options}", "attention")
    where = pick_device(device)
    gpu = where.type == "cuda"
    return Asked(
        mechanism=make(name, **own),
        peers=_names(peers),
        lengths=tuple(lengths_of(lengths or ("64K,256K,1M,4M,10M" if gpu else "1K,2K,4K"))),
        whats=_names(what),
        chunk=tokens_of(chunk or ("32K" if gpu else "512")),
        device=where,
        dtype=torch.bfloat16 if gpu else torch.float32,
        where=environment(where, "", [])["device"],
        **others,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


def _measure(
    asked: Asked, journal: Journal, began: float, minutes: float | None, out: str | None, progress: Progress
) -> None:
    from longspan.bench.attention.run import run, versions
    from longspan.evals.environment import environment

    about = environment(asked.device, "bench attention", sys.argv[3:]) | versions(asked.device)
    about["command"] = f"longspan bench attention {shlex.join(_again(sys.argv[3:]))}"
    journal.begin(about)
    again = f"the same command goes on from {out}" if out else "nothing is kept without --out FOLDER"
    until = None if minutes is None else began + 60 * minutes
    try:
        left = run(asked, journal, lambda: until is not None and time.monotonic() > until, progress.say, progress.busy)
    except (KeyboardInterrupt, Cancelled) as error:
        raise Cancelled(f"stopped: {again}") from error
    if left:
        progress.say(f"stopped after {minutes:g} minutes without {', '.join(left)}: {again}")


def _again(arguments: list[str]) -> list[str]:
    """Return what measures the same elsewhere: the arguments without the folder that rows are kept in."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
    return kept
