"""Options that every eval of generated questions has, as one group: a command takes a `Shared` and adds its own.

It loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import typer

from longspan.cli import options
from longspan.errors import UsageError

Mechanisms = Annotated[
    str | None,
    typer.Option(
        "--mechanisms",
        metavar="SPECS",
        help="Several ways to attend in place of --attention, spaces between; all: dense and all that choose.",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option("--budgets", metavar="SHARES", help="Shares of the context's keys that may be read, such as 1/4,1/8."),
]
Tasks = Annotated[str, typer.Option("--tasks", metavar="NAMES", help="Tasks with commas between, or all.")]
Lengths = Annotated[
    str, typer.Option("--lengths", metavar="N,N", help="Tokens of prompt and answer together, such as 4K,8K.")
]
Questions = Annotated[int, typer.Option("--questions", metavar="N", help="Questions of each task at each length.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Which questions.")]
Place = Annotated[
    str, typer.Option("--question", metavar="WHERE", help="Where the question stands: after the context, before, both.")
]
Order = Annotated[
    str,
    typer.Option(
        "--order", metavar="WHERE", help="Passages that share most words with the question: kept, first or last."
    ),
]
Context = Annotated[
    str,
    typer.Option(
        "--context",
        metavar="SPEC",
        help="What is read of a context: full, retrieved (passages chosen for the question; by=dense, hybrid "
        "or heads, passages=8) or summary (of its chunks; chunk=1024).",
    ),
]
Haystack = Annotated[
    list[str] | None,
    typer.Option(
        "--haystack",
        metavar="PATH",
        help="Prose for haystacks: a file or a folder; may be given several times. "
        "Default: the Python language reference.",
    ),
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. Default: what the device is best at."),
]
Out = Annotated[
    str | None,
    typer.Option("--out", metavar="FOLDER", help="Keep answers and a report here; a run that was stopped goes on."),
]
Minutes = Annotated[
    float | None, typer.Option("--minutes", metavar="M", help="Stop after the question asked at that time.")
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Ask every N-th question, from the I-th on: N processes share one --out."
    ),
]

BaseURL = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        help="Ask an endpoint of the OpenAI protocol, such as http://127.0.0.1:8000/v1, in place of a model here; "
        "--model is then its name there. The key comes from LONGSPAN_API_KEY.",
    ),
]
Completions = Annotated[
    bool,
    typer.Option("--completions", help="Ask the endpoint to complete a text, so that answer prefixes begin answers."),
]
Parallel = Annotated[int, typer.Option("--parallel", metavar="N", help="Questions asked of the endpoint at once.")]
Timeout = Annotated[float, typer.Option("--timeout", metavar="S", help="Seconds that the endpoint may be silent.")]
CountedBy = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        help="Counts tokens for the endpoint: a folder, a GGUF file or a hub name. Default: smollm2's.",
    ),
]
KeyVariable = Annotated[
    str | None, typer.Option("--api-key-env", metavar="NAME", help="The variable that holds the endpoint's key.")
]
KeyFile = Annotated[
    str | None, typer.Option("--api-key-file", metavar="FILE", help="The file that holds the endpoint's key.")
]


@dataclass(frozen=True)
class Shared:
    """What is asked, of whom, and where answers go: every field is an option."""

    model: options.Model = None
    adapter: options.Adapter = None
    attention: options.Attention = None
    mechanisms: Mechanisms = None
    budgets: Budgets = None
    tasks: Tasks = "all"
    lengths: Lengths = "4K"
    questions: Questions = 5
    seed: Seed = 0
    question: Place = "after"
    order: Order = "kept"
    context: Context = "full"
    prefill: options.Prefill = None
    kv: options.KVFormat = "auto"
    kv_budget: options.KVBudget = None
    haystack: Haystack = None
    device: options.Device = "auto"
    dtype: DType = None
    out: Out = None
    minutes: Minutes = None
    shard: Shard = None
    base_url: BaseURL = None
    completions: Completions = False
    parallel: Parallel = 1
    timeout: Timeout = 600.0
    tokenizer: CountedBy = None
    api_key_env: KeyVariable = None
    api_key_file: KeyFile = None
    json: options.AsJson = False


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options of `Shared` in place of its parameter `given`."""
    return options.grouped(command, "given", Shared)


def shares_of(text: str) -> list[str]:
    """Read shares such as `1/2,1/8`, each of them once (UsageError: one is none)."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            share = Fraction(part)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share <= 1:
            raise UsageError(f"{part!r} is no share of the keys: write 1/8 or 0.125")
        found.append(part)
    if not found:
        raise UsageError("--budgets names no share of the keys: write 1/4,1/8")
    return list(dict.fromkeys(found))


def shard_of(text: str | None) -> tuple[int, int]:
    """Read which of how many parts is asked, such as `1/4`, as (0, 4) (UsageError: it is none)."""
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UsageError(f"--shard {text!r} is no part: write 1/4 for the first of four")
    return int(part) - 1, int(parts)
