"""Answers that must have a form: an adapter of llguidance, which says token by token what may come next.

A grammar (from a JSON schema, or in llguidance's Lark) is compiled once a request and copied for every choice. This
module knows no endpoints; the library is the only one that knows grammars (docs/architecture.md says why this one).
"""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from longspan.errors import UsageError
from longspan.hf.model import CausalModel
from longspan.server.refusals import ApiError

_COMPACT: dict[str, Any] = {
    # A model that may write blanks for ever sometimes does: one blank after , and : as Python writes JSON.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_LONGEST = 200_000
"""Characters of a grammar: a request must not keep the server compiling."""


class Vocabulary:
    """A model's tokens as bytes, made on first use: about a second for 150K of them."""

    def __init__(self, model: CausalModel) -> None:
        """Take the model whose tokenizer it is."""
        self._model = model
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None

    def get(self) -> LLTokenizer:
        """Return llguidance's form of the tokenizer (ApiError: a slow tokenizer has none)."""
        with self._lock:
            if self._made is None:
                backend = getattr(self._model.tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise ApiError(
                        400, "this model's tokenizer is a slow one: answers of a given form, tools and logprobs need "
                        "a fast one", code="unsupported_parameter",
                    )  # fmt: skip
                ends = sorted(self._model.end_tokens) or None
                self._made = LLTokenizer(backend.to_str(), eos_token=ends)
            return self._made

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token; of a special one, its name."""
        made = self.get()
        if token >= made.vocab_size:
            return b""
        return bytes(made.decode_bytes([token])).lstrip(b"\xff")


class Grammar:
    """What an answer may say; called for each choice, it makes what follows that choice."""

    def __init__(self, vocabulary: Vocabulary, grammar: str, field: str) -> None:
        """Compile a grammar.

        Args:
            vocabulary: of the model.
            grammar: as llguidance's functions make it.
            field: of the request, which is named where the grammar is refused.

        Raises:
            ApiError: it can't be compiled.
        """
        if len(grammar) > _LONGEST:
            raise ApiError(400, f"'{field}' makes a grammar of {len(grammar)} characters: at most {_LONGEST} are taken",
                           param=field)  # fmt: skip
        self._matcher = LLMatcher(vocabulary.get(), grammar, log_level=0)
        if self._matcher.is_error():
            told = self._matcher.get_error().strip().splitlines()
            raise ApiError(
                400, f"'{field}' can't be followed: {told[0] if told else 'it is no schema'}", param=field,
                code="invalid_schema",
            )  # fmt: skip

    def __call__(self) -> Follower:
        """Return what follows one choice."""
        return Follower(self._matcher.deep_copy())


class Follower:
    """One choice's place in a grammar (a `Constraint` of `engine.serving`)."""

    def __init__(self, matcher: LLMatcher) -> None:
        """Take a matcher that nobody else uses."""
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """Return a bitmask int32 `[ceil(V / 32)]` of the tokens that may come next."""
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():  # its mask would end the answer, as if it were whole
            raise UsageError("the schema has too many ways to go on for an answer to follow it: give a simpler one")
        return torch.frombuffer(bytearray(mask), dtype=torch.int32)

    def accept(self, token: int) -> None:
        """Be told which came."""
        self._matcher.consume_token(token)


def of_schema(vocabulary: Vocabulary, schema: dict[str, Any], field: str) -> Grammar:
    """Return the grammar of a JSON schema (ApiError: it can't be followed)."""
    try:
        # A client's own compiler options would undo ours, and let it write blanks for ever.
        made = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)
    except ValueError as error:
        raise ApiError(400, f"'{field}' can't be followed: {error}", param=field, code="invalid_schema") from error
    return Grammar(vocabulary, made, field)


def compact(schema: dict[str, Any]) -> str:
    """Return a schema as a Lark grammar embeds it, written without blanks that the model could add."""
    return json.dumps({**schema, "x-guidance": _COMPACT})
