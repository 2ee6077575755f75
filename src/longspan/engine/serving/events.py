"""What a request tells while it is worked on: how far reading is, text, and how it ended.

All are values: whoever gets one may keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longspan.engine.generation import Citation


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, and which were likelier or as likely."""

    token: int
    logprob: float
    """Natural logarithm of the probability that the model itself gave, before temperature and penalties."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their logarithms, best first, as many as were asked for."""


@dataclass(frozen=True)
class Progress:
    """How far reading is."""

    read: int
    """Tokens of documents and prompt that are read, those that were read before among them."""
    total: int


@dataclass(frozen=True)
class PromptRead:
    """How likely the prompt's own tokens were, where `Request.prompt_logprobs` asked for it; before any text."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """Of every token but the first."""


@dataclass(frozen=True)
class Delta:
    """The next piece of a choice's text."""

    index: int
    """Which of the request's `n` choices."""
    text: str
    """May be empty: a character, or what may be a stop string, is not complete."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of these tokens, where they were asked for."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice."""

    prompt_tokens: int = 0
    """Of documents and prompt together."""
    cached_tokens: int = 0
    """Those of them that were not computed for this request."""
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    """From `submit` to the first token; 0: there was none."""


@dataclass(frozen=True)
class Done:
    """A choice has ended; nothing of it follows."""

    index: int
    finish_reason: str
    """`stop`: the model ended it, a stop string or a constraint did; `length`: max_tokens or a full window;
    `cancelled`; `read`: documents alone were to be read."""
    usage: Usage
    citations: tuple[Citation, ...] = ()
    """Passages of a session's documents that the answer rests on."""
    stopped_by: str | None = None
    """The stop string that ended it."""
    notes: tuple[str, ...] = field(default=())
    """What a person should know."""
    unsourced: str = ""
    """Why attention names no sentence that the answer was read from; empty: it does, or nobody asked."""


Event = Progress | PromptRead | Delta | Done
