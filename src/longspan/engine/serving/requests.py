"""What a scheduler is asked, and how much of it a scheduler takes. It does not know models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from longspan.engine.sampler import SamplingParams
from longspan.errors import UsageError

MOST_LOGPROBS = 50


class Constraint(Protocol):
    """What a choice may say next, token by token; a library of constrained decoding stands behind it."""

    def allowed(self) -> Tensor:
        """Return which tokens may come next: bool `[V]`, or int32 `[ceil(V / 32)]`, bit `i % 32` of word `i // 32`.

        Where the text may end, the tokens that end an answer are among them.
        """
        ...

    def accept(self, token: int) -> None:
        """Be told which came."""
        ...


@dataclass(frozen=True)
class Request:
    """Something to read and something to write.

    Exactly one of `messages`, `text` and `tokens` is the prompt; without any, `documents` are read into the session.

    Attributes:
        messages: a conversation; with documents the last one of the user is the question about them.
        text: a prompt as it is, without the model's chat template.
        tokens: the same as token ids.
        documents: pairs of name and text, read before the prompt; those that the session holds already are left out.
        session: name of the session whose documents are asked; it is made where there is none, and saved. None: the
            documents are this request's alone.
        makes_session: False: a session that is not there when its turn comes is an error (`SessionNotFoundError`).
        params: how to sample, the same for every choice (of which each but the first adds its number to the seed).
        key: whose request it is; the keys' requests are served fairly.
        n: how many answers; documents and prompt are read once.
        logprobs: of how many of the likeliest tokens the probabilities are told beside the chosen one's; None: of none.
        prompt_logprobs: the same of the prompt's own tokens (`PromptRead`).
        constraint: makes what limits a choice, one for each of them.
        priority: higher ones are served before lower ones, whatever the keys.
        remember: whether question and answer join the session's conversation (of the first choice).
        citations: whether passages are cited; mechanisms that are told what to read choose in any case.
        tools: descriptions of tools for the chat template, as OpenAI's API has them.

    Raises:
        UsageError: no prompt or several, or a number out of its range.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    tokens: Sequence[int] | None = None
    documents: Sequence[tuple[str, str]] = ()
    session: str | None = None
    makes_session: bool = True
    params: SamplingParams = field(default_factory=SamplingParams)
    key: str = ""
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    priority: int = 0
    remember: bool = False
    citations: bool = True
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        given = [name for name in ("messages", "text", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} are given: a request has one prompt")
        if not given and not self.documents:
            raise UsageError("the request has no prompt: give messages, text or tokens")
        if any(not getattr(self, name) for name in given):
            raise UsageError(f"{given[0]} is empty: give the model something to go on from")
        if self.n < 1:
            raise UsageError(f"n is {self.n}: it must be at least 1")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MOST_LOGPROBS:
                raise UsageError(f"{name} is {count}: it must be from 0 to {MOST_LOGPROBS}")

    @property
    def characters(self) -> int:
        """Number of characters that are to be made tokens."""
        told = [text for _, text in self.documents] + [self.text or ""]
        told += [str(message.get("content")) for message in self.messages or ()]
        return sum(map(len, told))

    @property
    def reads_only(self) -> bool:
        """Whether nothing is to be written."""
        return self.messages is None and self.text is None and self.tokens is None


@dataclass(frozen=True)
class Limits:
    """How much a scheduler takes on; what is beyond it is refused in one line."""

    queue: int = 256
    """Requests that wait; more are refused with `BusyError`."""
    sequences: int = 32
    """Answers that are written at once."""
    reading: int = 8
    """Requests whose documents and prompts are read at once, turn by turn."""
    request_tokens: int | None = None
    """Tokens of a request's documents and prompt together; None: no limit."""
    answer_tokens: int | None = None
    """`max_tokens` at most; None: no limit."""
    choices: int = 16
    """`n` at most."""
    sessions: int = 64
    """Sessions held in memory; those not used for longest are saved and let go."""
    session_bytes: int | None = None
    """That sessions may take on the device, as far as those in use take no more; None: no limit but the KV budget."""
    session_host_bytes: int = 0
    """Of host memory for sessions that leave the device; 0: they are on disk alone."""
    session_seconds: float | None = None
    """Without use after which a session leaves memory; None: only where room is short."""
    cached: int = 16
    """Contexts of requests without a session that are kept for others that begin alike."""
    share: float = 0.6
    """Of the time in which answers are written and texts read, what reading gets at most."""
    token_seconds: float | None = None
    """Between two tokens of an answer on average: as few are written at once as that takes, and others wait; None:
    `sequences` are."""
    step_seconds: float | None = None
    """How long one chunk of reading may hold up answers; None: by how long their own step takes."""
