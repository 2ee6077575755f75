"""Options that several commands share, with their help.

How an answer is sampled is asked for by a whole group of them: a command that answers takes one `Sampling`, and
`sampled` makes it the options that it stands for. It loads nothing heavy.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from longspan.engine.sampler import SamplingParams

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
Prefill = Annotated[
    str | None,
    typer.Option(
        "--prefill",
        metavar="SPEC",
        help="How documents are read, such as xattention:threshold=0.9. Default: as --attention, or densely where "
        "that chooses only for answers.",
    ),
]
KVFormat = Annotated[
    str,
    typer.Option(
        "--kv",
        metavar="SPEC",
        help="How keys and values are kept: auto, fp32, fp16, bf16, fp8, int8, int4, int3 or int2, with options such "
        "as int4:group=64.",
    ),
]
KVBudget = Annotated[
    str | None,
    typer.Option("--kv-budget", metavar="BYTES", help="Most memory for keys and values, such as 8GiB or 500MB."),
]
KVTier = Annotated[
    str | None,
    typer.Option(
        "--kv-tier",
        metavar="SPEC",
        help="Where pages move that --kv-budget does not hold, to be read from there: "
        "host=8GiB,disk=50GiB:FOLDER, either part or both.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        metavar="HOW",
        help="How a CPU reads weights while it answers: auto (in 4 or 8 bits where a GGUF file held them so, without "
        "loss), own (as they are), or int8 (8 bits for all, with a small loss). Example: --weights int8.",
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        metavar="N",
        help="Spread the context over N GPUs of this machine. Example: --gpus 2. For several machines start longspan "
        "with torchrun.",
    ),
]
Parallel = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        metavar="HOW",
        help="How a context is read over several GPUs: sharded, ring, context_parallel, or auto; ,experts "
        "behind it: each GPU holds a part of the experts (see docs/distributed.md). Example: --gpus 2 --parallel ring.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="What longspan convert or extend trained for this model. It attends as it was trained to unless "
        "--attention says otherwise.",
    ),
]
Quote = Annotated[
    bool,
    typer.Option(
        "--quote/--no-quote",
        help="Whether the text is quoted after an answer whose own words are not in it (never with --stop).",
    ),
]
Sources = Annotated[
    bool,
    typer.Option(
        "--sources/--no-sources",
        help="Whether attention tells which sentences an answer was read from: the first passages it rests on.",
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


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled and where they end: every field is an option."""

    max_tokens: MaxTokens = 256
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    seed: Seed = None
    stop: Stop = None

    def params(self) -> SamplingParams:
        """Return them as the engine takes them (UsageError: one is out of range)."""
        from longspan.engine.sampler import SamplingParams

        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return SamplingParams(**{**given, "stop": tuple(self.stop or ())})


def sampled(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the options of `Sampling` in place of its parameter `sampling`."""
    return grouped(command, "sampling", Sampling)


def grouped(command: Callable[..., None], name: str, group: type) -> Callable[..., None]:
    """Return a command that has the fields of a dataclass as options in place of its parameter of that name.

    typer reads options off a function's signature and knows no groups of them, so the signature is made here.
    """
    hints = typing.get_type_hints(group, include_extras=True)
    own = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        named = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters += own if parameter.name == name else [named]

    def with_options(**given: Any) -> None:
        command(**{name: group(**{each.name: given.pop(each.name) for each in own})}, **given)

    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options
