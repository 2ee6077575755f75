"""`longspan convert` and `longspan extend`: a small adapter for an ordinary checkpoint, trained on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli import options, output, work
from longspan.cli.progress import Progress
from longspan.errors import UsageError

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Text to learn from: a file or a folder; several times. Default: Python's own docs.",
    ),
]
Hours = Annotated[float, typer.Option("--hours", metavar="H", help="Training time in all, earlier starts included.")]
Out = Annotated[
    str, typer.Option("--out", metavar="FOLDER", help="The adapter, its curves, and what a stopped run goes on from.")
]
Length = Annotated[int, typer.Option("--length", metavar="N", help="Longest text of a step, in tokens.")]
Asked = Annotated[
    float, typer.Option("--asked", metavar="SHARE", help="Share of texts that end in questions about facts in them.")
]
Chat = Annotated[
    str | None,
    typer.Option(
        "--chat",
        metavar="FILE",
        help='Conversations to mix in, lines {"messages": [...]}: an adapted model stays polite. own: the package\'s.',
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="What is drawn; the same gives the same steps.")]
Begin = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="An adapter of the model to begin with; the new one holds both."),
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. Default: as the device likes."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(
        epilog="Example: longspan convert --model smollm2 --attention superlinear:window=512 --hours 0.5 --out routed"
    )(convert)
    app.command(epilog="Example: longspan extend --model smollm2 --to 32K --hours 1 --out longer")(extend)


def convert(
    out: Out,
    attention: Annotated[
        str, typer.Option("--attention", "-a", metavar="SPEC", help="What the model is taught: superlinear or infini.")
    ] = "superlinear",
    model: options.Model = None,
    adapter: Begin = None,
    data: Data = None,
    hours: Hours = 0.5,
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Of routing queries (superlinear).")] = 16,
    lora: Annotated[
        int, typer.Option("--lora", metavar="N", help="Rank of changes of the model's own layers; 0: they stay.")
    ] = 0,
    length: Length = 4096,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Queries of a text that are compared.")] = 64,
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="Learning rate of routing queries.")] = 1e-3,
    asked: Asked = 0.5,
    chat: Chat = None,
    seed: Seed = 0,
    device: options.Device = "auto",
    dtype: DType = None,
    json: options.AsJson = False,
) -> None:
    """Teach a model a mechanism: what it needs beside the weights, and with --lora the weights too.

    First dense attention is watched, with the model frozen: superlinear's routing queries learn where it looks,
    infini's gates how much of its memory helps. With --lora the mechanism is then switched on and small changes of the
    model's layers learn under it. Use the result with --model M --adapter FOLDER. Ctrl-C stops; the same command goes
    on.
    """
    with Progress() as progress:
        loaded, text = _start(model, adapter, device, dtype, data, chat, hours, progress)
        from longspan.attention import parse
        from longspan.train.convert import Options
        from longspan.train.convert import convert as run

        given = Options(rank=rank, lora=lora, length=length, rows=rows, rate=rate, asked=asked, seed=seed)
        made = run(loaded, parse(attention), text, Path(out), hours * 3600, given, tell=progress.say)
    _end(made, out, loaded.name, json)


def extend(
    to: Annotated[str, typer.Option("--to", metavar="N", help="Positions of the new window, such as 128K.")],
    out: Out,
    model: options.Model = None,
    adapter: Begin = None,
    data: Data = None,
    hours: Hours = 0.5,
    rotation: Annotated[
        str, typer.Option("--rotation", metavar="HOW", help="yarn, or base (a greater base of rotation).")
    ] = "yarn",
    lora: Annotated[int, typer.Option("--lora", metavar="N", help="Rank of changes of the model's layers.")] = 16,
    length: Length = 4096,
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="Learning rate.")] = 2e-4,
    asked: Asked = 0.5,
    chat: Chat = None,
    seed: Seed = 0,
    device: options.Device = "auto",
    dtype: DType = None,
    json: options.AsJson = False,
) -> None:
    """Teach a model a longer window: other rotations, texts whose positions skip, small changes of its layers.

    Use the result with --model M --adapter FOLDER. Ctrl-C stops; the same command goes on.
    """
    with Progress() as progress:
        from longspan.lengths import context_of

        window = context_of(to)
        loaded, text = _start(model, adapter, device, dtype, data, chat, hours, progress)
        from longspan.train.extend import Options
        from longspan.train.extend import extend as run

        given = Options(window, rotation, lora, length, rate, asked, seed)
        made = run(loaded, text, Path(out), hours * 3600, given, tell=progress.say)
    _end(made, out, loaded.name, json)


def _start(
    model: str | None,
    adapter: str | None,
    device: str,
    dtype: str | None,
    data: list[str] | None,
    chat: str | None,
    hours: float,
    progress: Progress,
) -> tuple[Any, Any]:
    """Return the model and what it learns from (errors as theirs; UsageError: no time)."""
    if not hours > 0:
        raise UsageError(f"--hours {hours:g} leaves no time: give more than 0")
    text = work.prose_of(data, progress)
    from longspan.train.data import Texts, conversations

    chats = [] if chat is None else conversations(chat)
    from longspan import settings
    from longspan.evals.arguments import dtype_of
    from longspan.hf.loading import load
    from longspan.hf.model import CausalModel

    name = model or settings.default_model()
    progress.busy(f"loading {name}")
    kind = None if dtype is None else dtype_of(dtype)
    loaded = load(name, device=device, dtype=kind, adapter=adapter, say=progress.say)
    plain = CausalModel(loaded.name, loaded.model, loaded.tokenizer, native=False, adapter=loaded.adapter)
    return plain, Texts(plain, text, chats)


def _end(adapter: Any, out: str, model: str, as_json: bool) -> None:
    size = sum(file.stat().st_size for file in Path(out).iterdir() if file.name.startswith("adapter"))
    if as_json:
        output.write_json({"adapter": out, "bytes": size, "model": model, **adapter.about})
        return
    output.write(f"{out}: {size / 2**20:.1f} MiB, with curves.png\n")
    if sys.stderr.isatty():
        output.say(f"Use it: longspan ask QUESTION --doc PATH --model {model} --adapter {out}", dim=True)
