"""What the command lines of evals and benches share: model, device, mechanisms, lengths, JSON, errors in one line.

It does not know what is measured. The user's own commands are in `cli/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from longspan.attention import parse
from longspan.errors import Cancelled, LongspanError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Number types that a model may compute in, by name."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, told by `guarded` as all others are."""

    def error(self, message: str) -> NoReturn:
        """Refuse arguments (always a UsageError)."""
        raise UsageError(f"{message} (see: {self.prog} --help)")


def parser(module: str, about: str, *, mechanisms: str, lengths: str) -> Parser:
    """Return a parser with the shared options; `mechanisms` and `lengths` are their defaults."""
    made = Parser(prog=f"python -m {module}", description=about)
    made.add_argument("--model", metavar="NAME", help="as for longspan ask; default: LONGSPAN_MODEL, else smollm2")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument(
        "--mechanisms",
        metavar="SPECS",
        default=mechanisms,
        help="specifications with spaces or semicolons between; default: %(default)s",
    )
    made.add_argument("--lengths", default=lengths, help="in tokens, commas between; default: %(default)s")
    made.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return made


def specs_of(text: str, *, auto: bool = False) -> list[str]:
    """Return the specifications in a text, each of them once, as they were written.

    Args:
        text: with spaces or semicolons between; commas stand between a mechanism's options.
        auto: whether `auto`, the engine's own choice, is one.

    Raises:
        UsageError: none is named, or one is wrong.
    """
    specs = list(dict.fromkeys(text.replace(";", " ").split()))
    if not specs:
        raise UsageError("no mechanism is named: give one with --mechanisms")
    for spec in specs:
        if not (auto and spec == "auto"):
            parse(spec)
    return specs


def dtype_of(name: str) -> torch.dtype:
    """Return the number type of a name (UsageError: not one of `DTYPES`)."""
    if name not in DTYPES:
        raise UsageError(f"unknown number type {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def say(text: str) -> None:
    """Write a line to standard error at once."""
    print(text, file=sys.stderr, flush=True)


def guarded(name: str, work: Callable[[], int]) -> int:
    """Do a command's work and return its exit code; what is refused, fails or is stopped gets one line.

    Codes are those of `longspan`: 1 failed, 2 usage, 130 Ctrl-C.
    """
    try:
        return work()
    except KeyboardInterrupt:
        say(f"{name}: stopped")
        return 130
    except LongspanError as error:
        say(f"{name}: {' '.join(str(error).split())}")
        return 130 if isinstance(error, Cancelled) else 2 if isinstance(error, UsageError) else 1
