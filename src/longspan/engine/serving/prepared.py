"""A request's texts as tokens, made before its turn on a thread beside the engine's. It does not know sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longspan.engine.reading import Split
from longspan.engine.serving.requests import Request
from longspan.errors import ContextTooLongError, UsageError
from longspan.hf.model import CausalModel
from longspan.sessions.session import Turn


@dataclass(frozen=True)
class Prepared:
    """What a request's texts are to the model."""

    documents: list[tuple[str, str, Split]]
    """Name, text and tokens of each."""
    prompt: list[int] | None
    """Of a request without documents and session; None: it depends on what the session has read."""

    @property
    def tokens(self) -> int:
        """Number of tokens, as far as they are known."""
        return sum(len(tokens) for _, _, (tokens, _) in self.documents) + len(self.prompt or ())


def prepare(model: CausalModel, request: Request, most: int | None) -> Prepared:
    """Return a request's tokens.

    Args:
        model: whose tokens.
        request: what is asked.
        most: tokens that it may have; None: any number.

    Raises:
        ContextTooLongError: it has more.
        UsageError: the chat template refuses the conversation, or token ids are none of the model's.
    """
    documents = [(name, text, model.tokens_with_offsets(text)) for name, text in request.documents]
    alone = request.session is None and not documents
    made = Prepared(documents, prompt_of(model, request) if alone else None)
    if most is not None and made.tokens > most:
        raise ContextTooLongError(f"the request has {made.tokens} tokens, and at most {most} are read here: shorten it")
    return made


def prompt_of(model: CausalModel, request: Request) -> list[int]:
    """Return the tokens of a prompt that no documents stand before (errors: as `prepare`)."""
    if request.messages is not None:
        return model.tokens(model.chat(request.messages, request.tools))
    if request.tokens is None:
        return model.tokens(request.text or "")
    size = model.config.vocab_size
    if (wrong := next((token for token in request.tokens if not 0 <= token < size), None)) is not None:
        raise UsageError(f"the prompt holds the token id {wrong}: the model has {size}")
    return list(request.tokens)


def question_of(request: Request, turns: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
    """Return what is asked of documents, and the conversation before it: the request's own, or else the session's.

    Raises:
        UsageError: there is no question that could stand behind documents.
    """
    if request.messages is None:
        if request.text is None:
            raise UsageError("token ids can't ask about documents: give messages or a text")
        return request.text, turns
    told = [(str(message.get("role")), _words(message)) for message in request.messages]
    if told[-1][0] != "user":
        raise UsageError(f"the last message is of the role {told[-1][0]!r}: the user's asks about documents")
    own: list[Turn] = []
    asked: str | None = None
    for role, words in told[:-1]:
        if role == "user":
            asked = words
        elif role == "assistant" and asked is not None:
            own.append(Turn(asked, words))
            asked = None
    # What was read before the documents can't be changed any more: instructions stand with the question.
    instructions = [words for role, words in told if role in ("system", "developer")]
    return "\n\n".join([*instructions, told[-1][1]]), own or turns


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise UsageError("a message about documents must have a text as its content")
    return content
