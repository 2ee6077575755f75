"""`longspan bench model`: prefill and decode of a whole model, beside plain transformers and llama.cpp."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from longspan.cli import options, output
from longspan.cli.progress import Progress

EXAMPLE = 'longspan bench model --lengths 1K,4K,8000 --mechanisms "dense retrieval" --json'


def model(
    model: options.Model = None,
    mechanisms: Annotated[
        str, typer.Option("--mechanisms", metavar="SPECS", help="Specifications with spaces between.")
    ] = "dense streaming superlinear retrieval",
    lengths: Annotated[str, typer.Option("--lengths", metavar="N,N", help="Tokens of text.")] = "1K,4K,8000",
    prefill: options.Prefill = None,
    weights: options.Weights = "auto",
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
    """Measure tokens a second of a whole model, ours and plain transformers in turns, logits compared first."""
    with Progress() as progress:
        progress.busy("loading torch")
        from longspan.bench.model import Options, run

        given = Options(
            model=model,
            device=device,
            mechanisms=mechanisms,
            lengths=lengths,
            dtype=dtype,
            prefill=prefill,
            weights=weights,
            peer_python=None if peer_python is None else Path(peer_python),
            peer_model=None if peer_model is None else Path(peer_model),
            repeats=repeats,
        )
        found = run(given, f"longspan bench model {shlex.join(sys.argv[3:])}", progress.say)
    if json:
        output.write_json(found)
        return
    columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
    shown = output.table(columns[0], *(f">{name.replace('_', ' ')}" for name in columns[1:]))
    for row in found["rows"]:
        shown.add_row(*(str(row.get(name, "")) for name in columns))
    output.write_rich(shown)
