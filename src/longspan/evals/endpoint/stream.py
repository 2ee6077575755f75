"""Reads an answer of the OpenAI protocol, streamed as events or whole, with the times of its tokens.

Both forms of it are read: chat completions (`delta.content`, `message.content`) and completions (`text`). What a model
thinks before it answers (`reasoning_content`) is no answer, but it is its first token. It does not know connections.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class BrokenAnswerError(Exception):
    """An answer that is none of the protocol's, or ended in the middle: worth another try."""


class ToldError(Exception):
    """The endpoint told an error within its answer."""

    def __init__(self, error: object) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Answer:
    """What was answered, and when."""

    text: str = ""
    began: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    """Seconds from the request to the first token; 0: the answer came whole, or is empty."""
    seconds: float = 0.0
    pieces: int = 0
    """Events with text: about as many as tokens, where the endpoint counts none."""
    usage: dict[str, Any] = field(default_factory=dict)
    """Tokens as the endpoint counts them; empty: it does not."""

    def count(self, *path: str) -> int | None:
        """Return a figure of the usage (None: it is not there, or no whole number)."""
        found: Any = self.usage
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def streamed(lines: Iterable[str], answer: Answer) -> Answer:
    """Read an answer that comes as server-sent events.

    Args:
        lines: of the response, as they come.
        answer: begun with the request.

    Raises:
        BrokenAnswerError: it is none, or ended before its end.
        ToldError: the endpoint told an error in it.
    """
    ended = False
    for line in lines:
        name, _, value = line.partition(":")
        if name != "data":  # comments keep connections alive; other fields say nothing here
            continue
        value = value.strip()
        if value == "[DONE]":
            ended = True
            break
        ended |= _add(_object(value), answer)
    if not ended:
        raise BrokenAnswerError("the answer ended in the middle")
    answer.seconds = time.perf_counter() - answer.began
    return answer


def whole(data: bytes, answer: Answer) -> Answer:
    """Read an answer that came in one piece: an endpoint need not stream (errors as `streamed`)."""
    _add(_object(data.decode("utf-8", "replace")), answer)
    answer.seconds, answer.first = time.perf_counter() - answer.began, 0.0
    return answer


def _add(event: dict[str, Any], answer: Answer) -> bool:
    """Add a piece of an answer; return whether it says that it is the last with text."""
    if event.get("error"):
        raise ToldError(event["error"])
    if isinstance(event.get("usage"), dict):
        answer.usage = event["usage"]
    ended = False
    choices = event.get("choices") or []
    for choice in choices if isinstance(choices, list) else [None]:
        part: Any = choice
        if isinstance(choice, dict):
            part = choice.get("delta") or choice.get("message") or choice
        if not isinstance(choice, dict) or not isinstance(part, dict):
            raise BrokenAnswerError("the answer has a choice that is no object")
        thought = part.get("reasoning_content") or part.get("reasoning")
        text = _said(part.get("content") or part.get("text") or "")
        if (text or thought) and not answer.first:
            answer.first = time.perf_counter() - answer.began
        if text or thought:
            answer.pieces += 1
        answer.text += text
        ended |= bool(choice.get("finish_reason"))
    return ended


def _said(content: object) -> str:
    """Return the text of a content, which some endpoints send as a list of parts (BrokenAnswerError: it has none)."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") or "" for part in content if part.get("type") == "text"]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise BrokenAnswerError("the answer's content is no text")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BrokenAnswerError(f"the answer is no JSON object: {text[:80]!r}")
    return found
