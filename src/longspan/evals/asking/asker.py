"""Who is asked: the contract between an eval's questions and whatever answers them.

An `Asker` is a model in one way of attending, or an endpoint. A run (`run.py`) makes each example with the asker's own
`tokens` and `template`, so that lengths are exact for it, calls `ask`, scores `Reply.text`, and writes a row. An asker
holds nothing between calls: two questions never see one another.

    identity   who answers: what of a row's key is the asker's (see `Identity`)
    tokens     splits text into the tokens in which lengths are counted
    counted_by a hash of what `tokens` does: questions of two askers with the same one are the same questions
    template   what the asker puts around a prompt's parts, as far as it is known: its tokens are counted
    parallel   questions that may be asked at once (from as many threads); 1: one after another
    together   questions that `ask_all` answers side by side; 1: it is not called
    measures   whether `ask` can return the probability of a text (`Example.follows`) instead of an answer
    chooses    whether `choose` can tell which stretches of a text matter for a question, and `alike` which passages
    ask        reads an example's context, asks, and returns a `Reply`
    ask_all    the same for several examples, where `together` is more than 1: each gets the reply that `ask` gives

What can't be answered (a context that the asker can't hold, a request that was refused for its length) is a reply with
`error`, which counts as a score of 0 and says why in its row. What stops a run (no connection, no such model) raises a
LongspanError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from longspan.evals.questions.example import Example, Template

Tick = Callable[[int, int], None]
"""Told how many tokens of the context are read, and how many there are."""


@dataclass(frozen=True)
class Identity:
    """Who answers, as far as answers may depend on it: two askers that agree in all of it answer alike."""

    model: str
    """A name for people. The other fields decide whether a question was answered before."""
    fingerprint: str
    """Of the weights; of an endpoint, which shows none: its model's name."""
    dtype: str
    """The number type computed in; empty: unknown."""
    mechanism: str
    """How it attends, as it was asked for, without options at their defaults; `auto`: the engine chooses. A row is
    counted with those of the same mechanism and budget."""
    budget: str
    """The share of a context's keys that the mechanism reads, such as `1/4`; empty: as `mechanism` says."""
    attention: str
    """The specification that attends: `mechanism`, with the options that the budget set at this length."""
    prefill: str = ""
    """How documents are read; empty: as the attention does."""
    kv: str = "auto"
    """Format of keys and values."""
    kv_budget: int = 0
    """Bytes for keys and values; 0: no limit."""
    endpoint: str = ""
    """The URL that answers; empty: this process does."""


@dataclass(frozen=True)
class Reply:
    """What was answered, and how fast. Figures that an asker can't know are 0."""

    text: str
    """Without the answer prefix. It may end where nothing more could raise its score."""
    attention: str = ""
    """The mechanism that read: tells what `auto` was."""
    beyond: bool = False
    """Whether positions were read that the model was not trained on."""
    read_tokens: int = 0
    """Tokens of the context that the model read."""
    read_seconds: float = 0.0
    kept_bytes: int = 0
    """Of what is kept of the context, before the question is read."""
    first_token_seconds: float = 0.0
    """From the end of reading to the first token of the answer; of an endpoint: from the request."""
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    nll: float | None = None
    """Where `Example.follows` is measured: the mean negative log-likelihood of its tokens, natural logarithm."""
    error: str = ""
    """Why there is no answer, in one line; empty: there is one."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Further figures for the row by name, such as `prompt_tokens` and `cached_tokens` of an endpoint."""


class Asker(Protocol):
    """Answers questions: see the module."""

    @property
    def identity(self) -> Identity:
        """Who answers."""

    @property
    def counted_by(self) -> str:
        """A hash of how tokens are counted."""

    @property
    def template(self) -> Template:
        """What stands around a prompt's parts."""

    @property
    def parallel(self) -> int:
        """Questions that may be asked at once."""

    @property
    def together(self) -> int:
        """Questions that are answered side by side."""

    @property
    def measures(self) -> bool:
        """Whether the probability of a text can be returned."""

    @property
    def chooses(self) -> bool:
        """Whether `choose` and `alike` can be called."""

    def tokens(self, text: str) -> Sequence[object]:
        """Return a text's tokens, without special tokens at its ends."""

    def choose(self, text: str, question: str) -> list[tuple[int, int]]:
        """Return the stretches of a text (first character, and the one after the last) that matter most, best first."""

    def alike(self, texts: Sequence[str], question: str) -> list[int]:
        """Return all passages by number, those first whose states in the model are most like the question's."""

    def ask(self, example: Example, tick: Tick) -> Reply:
        """Answer an example that was made for these `tokens` and this `template`; greedy.

        Args:
            example: the question.
            tick: see `Tick`; an asker that does not know how far it is need not call it.

        Raises:
            LongspanError: nothing can be answered, this question or any other.
        """

    def ask_all(self, examples: Sequence[Example], tick: Tick) -> list[Reply]:
        """Answer several examples as `ask` does, at most `together`; `tick` is told of each context in its turn."""
