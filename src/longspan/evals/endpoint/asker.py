"""Asks a model behind an endpoint of the OpenAI protocol: see `asking.asker.Asker`.

As chat, context, question and answer prefix are one message of the user's, which the endpoint puts into its own
template. As completions (`raw`), the prompt is the same text that a model here would read: the tokenizer's template
around context and question, and the answer prefix begins the model's turn, so that it goes on from there.

Tokens are counted by a tokenizer here, which should be the model's. What the endpoint counted itself stands in the
row's measures: `prompt_tokens`, `cached_tokens`, `completion_tokens`. How it attends and what it keeps nobody knows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from longspan.engine import prompts
from longspan.evals.asking.asker import Identity, Reply, Tick
from longspan.evals.endpoint.client import Client, Refused
from longspan.evals.questions.example import Example, Template
from longspan.hf.tokenizer import Tokenizer

_COUNTS = {
    "prompt_tokens": ("prompt_tokens",),
    "cached_tokens": ("prompt_tokens_details", "cached_tokens"),
    "completion_tokens": ("completion_tokens",),
}
"""Names of measures, and where an endpoint's usage has them."""


class Endpoint:
    """A model of an endpoint."""

    measures = chooses = False
    together = 1

    def __init__(
        self, client: Client, model: str, tokenizer: Tokenizer, *, raw: bool = False, parallel: int = 1
    ) -> None:
        """Take an endpoint and one of its models.

        Args:
            client: sends the requests.
            model: as the endpoint names it.
            tokenizer: counts tokens.
            raw: whether to ask for completions of a text instead of an answer in a chat.
            parallel: questions that may be asked at once.
        """
        self._client, self._model, self._tokenizer, self._raw, self.parallel = client, model, tokenizer, raw, parallel
        how = "completions" if raw else "chat"
        self.identity = Identity(
            model=model, fingerprint=model, dtype="", mechanism=how, budget="", attention=how, endpoint=client.url
        )
        before, between = prompts.bare(tokenizer)
        self.template = Template(before, between) if between else Template()
        self.counted_by = tokenizer.tokenizer_hash
        self._counting = threading.Lock()

    def tokens(self, text: str) -> Sequence[object]:
        """See `Asker`; what reads less of a context counts in several threads, which tokenizers need not bear."""
        with self._counting:
            return self._tokenizer.tokens(text)

    def choose(self, text: str, question: str) -> list[tuple[int, int]]:
        """See `Asker`: an endpoint shows no heads."""
        raise AssertionError("an endpoint chooses nothing")

    def alike(self, texts: Sequence[str], question: str) -> list[int]:
        """See `Asker`: an endpoint shows no states."""
        raise AssertionError("an endpoint compares nothing")

    def ask_all(self, examples: Sequence[Example], tick: Tick) -> list[Reply]:
        """See `Asker`: an endpoint is asked from several threads instead."""
        raise AssertionError("an endpoint is asked one by one")

    def ask(self, example: Example, tick: Tick) -> Reply:
        """See `Asker`; a question that the endpoint refuses is a reply with `error`."""
        asked: dict[str, Any] = {
            "model": self._model,
            "max_tokens": example.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._raw:
            path, asked["prompt"] = "completions", example.template.before + example.context + example.closing
        else:
            told = f"{example.context}{example.asked} {example.answer_prefix}".rstrip()
            path, asked["messages"] = "chat/completions", [{"role": "user", "content": told}]
        try:
            answer = self._client.ask(path, asked)
        except Refused as error:
            return Reply("", error=str(error))
        counts = {name: answer.count(*place) for name, place in _COUNTS.items()}
        decoded = counts["completion_tokens"]
        return Reply(
            text=answer.text,
            read_tokens=counts["prompt_tokens"] or 0,
            first_token_seconds=answer.first,
            decoded_tokens=answer.pieces if decoded is None else decoded,
            decode_seconds=answer.seconds - answer.first if answer.first else 0.0,
            measures={name: count for name, count in counts.items() if count is not None},
        )
