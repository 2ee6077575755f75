"""How parts of an answer are written in OpenAI's API: usage, probabilities of tokens, citations, names of answers."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from longspan.engine.generation import Citation
from longspan.engine.serving import TokenLogprob, Usage
from longspan.server.constraint import Vocabulary


def new_id(kind: str) -> str:
    """Return a new name of an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def usage_of(usages: Iterable[Usage]) -> dict[str, Any]:
    """Return the usage of choices that share a prompt, which counts once."""
    found = list(usages)
    prompt = max((each.prompt_tokens for each in found), default=0)
    written = sum(each.completion_tokens for each in found)
    cached = max((each.cached_tokens for each in found), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def added(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of several prompts' usages."""
    made: dict[str, Any] = {
        name: sum(each[name] for each in usages) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in usages)
    return made | {"prompt_tokens_details": {"cached_tokens": cached}}


def text_of(vocabulary: Vocabulary, token: int) -> str:
    """Return the text of a token; bytes that are no characters of their own show as U+FFFD."""
    return vocabulary.bytes_of(token).decode("utf-8", "replace")


def chat_logprobs(vocabulary: Vocabulary, told: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Return probabilities as the chat endpoint tells them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        held = vocabulary.bytes_of(token)
        return {"token": held.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(held)}

    return [{**one(each.token, each.logprob), "top_logprobs": [one(*top) for top in each.top]} for each in told]


def finite(logprob: float) -> float:
    """Return a logarithm that JSON can hold: a token of no probability has -9999, as OpenAI's API says it."""
    return max(logprob, -9999.0)


def citations_of(citations: Iterable[Citation]) -> list[dict[str, Any]]:
    """Return passages as JSON."""
    return [dataclasses.asdict(each) for each in citations]
