"""Options that several commands share, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

Documents = Annotated[
    list[str] | None,
    typer.Option(
        "--doc", "-d", metavar="PATH", help="A file, a folder, or - for standard input; may be given several times."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A short name (see: longspan models), a hub name owner/model, a folder or a GGUF file. "
        "Default: LONGSPAN_MODEL, else smollm2.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        "-a",
        metavar="SPEC",
        help="How to attend, such as superlinear:window=2024 (see: longspan attention). "
        "Default: dense as long as everything fits the model's window, retrieval beyond.",
    ),
]
SessionName = Annotated[
    str | None,
    typer.Option(
        "--session", "-s", metavar="NAME", help="Keep what was read under this name, and go on from there next time."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token; more is more varied.")
]
TopP = Annotated[float, typer.Option("--top-p", metavar="X", help="Draw from the likeliest tokens with this mass.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", help="Draw from the N likeliest tokens; 0 is off.")]
MinP = Annotated[
    float, typer.Option("--min-p", metavar="X", help="Leave out tokens less likely than X times the likeliest.")
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Makes drawing repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends the answer; may be given several times.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
