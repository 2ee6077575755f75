"""One question of an eval, apart from who answers it, and what a family of tasks must know to make it.

Unless a setup says otherwise, a context is read before the question is known, so that what a method keeps of it can't
depend on the question. It does not know models: a tokenizer is any function from text to tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from longspan.evals.questions.sources import Sources

T = TypeVar("T")
Tokens = Callable[[str], Sequence[object]]
"""Splits a text into tokens, without special tokens at its ends."""
Guess = Callable[[random.Random], str]
"""Answers in the right form without having read."""


@dataclass(frozen=True)
class Template:
    """What stands around a question's parts: a chat template's text, or nothing for a model without one."""

    before: str = ""
    """Before the context."""
    between: str = " "
    """Between question and answer prefix: the end of the user's turn and the beginning of the model's."""


def silent(_: random.Random) -> str:
    """Guess nothing."""
    return ""


@dataclass(frozen=True)
class Example:
    """One question. Its prompt is template, context, what is asked, template, answer prefix, in this order."""

    task: str
    index: int
    """Its number among those of one task, length and seed."""
    context: str
    """Instruction and haystack: what is read before the question is asked."""
    head: str
    """How the context begins before its haystack does: instruction, solved example, or the question (`Setup`)."""
    question: str
    """What is to be answered, wherever it stands."""
    asked: str
    """What stands after the context in the user's turn: the question, or nothing where it stands before alone."""
    answer_prefix: str
    """What the answer begins with: it is given, and the model goes on."""
    outputs: tuple[str, ...]
    """What is right: see `scoring`."""
    scoring: str
    """A name of `scoring.SCORINGS`: how an answer is held against `outputs`."""
    max_tokens: int
    """Tokens that an answer may take."""
    tokens: int
    """Tokens of prompt and answer together: at most the length asked for."""
    depths: tuple[float, ...]
    """Where each needle begins, as a share of the context's characters, in their order; empty: nothing is hidden."""
    template: Template
    """What the example was made for."""
    follows: str = ""
    """Not empty: nothing is asked, and the probability of this text after the context is measured instead."""
    chance: float = 0.0
    """The score that `guess` has in the mean."""
    guess: Guess = field(default=silent, repr=False, compare=False)

    @property
    def closing(self) -> str:
        """All of the prompt that stands after its context."""
        return self.asked + self.template.between + self.answer_prefix


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


def in_turn(things: Sequence[T], setting: Setting) -> T:
    """Return the thing whose turn it is: each once, in an order given by the seed, before any comes again."""
    order = list(range(len(things)))
    random.Random(f"in-turn-{setting.order}").shuffle(order)
    return things[order[setting.index % len(order)]]


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
    head: str = ""
    """What every context begins with, whatever its size: see `Example.head`."""
    follows: str = ""
    """See `Example.follows`."""
    max_tokens: int = 0
    """Tokens that this answer may take; 0: as many as its family's."""
    chance: float = 0.0
    guess: Guess = silent


class Family(Protocol):
    """Tasks that differ in their configuration alone: a frozen dataclass of it."""

    @property
    def max_tokens(self) -> int:
        """Tokens that an answer may take."""

    @property
    def scoring(self) -> str:
        """See `Example.scoring`."""

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """Return an example, drawn from `rng` alone."""


@dataclass(frozen=True)
class Eval:
    """Tasks that belong together: what `longspan eval NAME` asks."""

    name: str
    about: str
    """What it measures, in one line."""
    paper: str
    version: int
    """Of the questions: to be raised by whoever changes what a seed gives."""
    tasks: Mapping[str, Family]
    """By name, in the order of tables."""
    paired: bool = False
    """Whether a question's number stands for the same question in every task and at every length, so that only what is
    around it differs."""
    ordered: frozenset[str] = frozenset()
    """Tasks whose context is passages that may be put in another order (`Setup.order`) or be read in part
    (`Setup.context`) without another answer becoming right."""
