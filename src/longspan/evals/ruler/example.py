"""One question of a task, apart from who answers it, and what a family must know to make it.

A context is read before the question is known, so that what a method keeps of it can't depend on the question. It does
not know models: a tokenizer is any function from text to tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from longspan.evals.ruler.sources import Sources

Tokens = Callable[[str], Sequence[object]]
"""Splits a text into tokens, without special tokens at its ends."""


@dataclass(frozen=True)
class Template:
    """What stands around a question's parts: a chat template's text, or nothing for a model without one."""

    before: str = ""
    """Before the context."""
    between: str = " "
    """Between question and answer prefix: the end of the user's turn and the beginning of the model's."""


@dataclass(frozen=True)
class Example:
    """One question. A prompt is template, context, question, template, answer prefix, in this order."""

    task: str
    index: int
    """Its number among those of one task, length and seed."""
    context: str
    """Instruction and haystack: what is read before the question is known."""
    question: str
    answer_prefix: str
    """What the answer begins with: it is given, and the model goes on."""
    outputs: tuple[str, ...]
    """What the answer should contain: all of it, or any (`part`)."""
    max_tokens: int
    """Tokens that an answer may take."""
    tokens: int
    """Tokens of prompt and answer together: at most the length asked for."""
    part: bool
    """Whether any of the outputs is enough (question answering)."""
    depths: tuple[float, ...]
    """Where each needle begins, as a share of the context's characters, in their order; empty: nothing is hidden."""


@dataclass(frozen=True)
class Setting:
    """What a family makes one example for."""

    tokens_of: Tokens
    length: int
    """Tokens of prompt and answer together."""
    sources: Sources
    index: int = 0
    """Of the example: families with a fixed set of questions take them in turn."""
    order: int = 0
    """The seed, which orders such a set."""


@dataclass(frozen=True)
class Draft:
    """An example whose haystack may still have any size."""

    context: Callable[[int], str]
    """Returns the context with so many units of haystack: lines, words, documents."""
    question: str
    answer_prefix: str
    outputs: tuple[str, ...]
    least: int
    """Units without which it is no example."""
    needles: tuple[str, ...] = ()
    """Texts that stand in the context exactly once."""


class Family(Protocol):
    """Tasks that differ in their configuration alone: a frozen dataclass of it."""

    @property
    def max_tokens(self) -> int:
        """Tokens that an answer may take."""

    @property
    def part(self) -> bool:
        """See `Example.part`."""

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """Return an example, drawn from `rng` alone."""
