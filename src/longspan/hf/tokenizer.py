"""A tokenizer alone, without its model: what is needed to count the tokens of a model that runs elsewhere.

It does not know who runs the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from longspan.errors import UsageError


class Tokenizer:
    """A tokenizer from transformers and its chat template."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Take a transformers tokenizer."""
        self.name, self.tokenizer = name, tokenizer

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens added at its ends."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """See `chat_of`."""
        return chat_of(self.tokenizer, messages, tools)

    @cached_property
    def tokenizer_hash(self) -> str:
        """See `hash_of`."""
        return hash_of(self.tokenizer)


def chat_of(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return a conversation as text in a tokenizer's own chat template, ready for the model's answer.

    One without a template gets plain paragraphs that end in `Answer:`.

    Raises:
        UsageError: the template refuses the conversation, or there is none to describe tools.
    """
    if not tokenizer.chat_template:
        if tools:
            raise UsageError("the model has no chat template, and so no way to be told of tools: leave them out")
        titles = {"system": "", "user": "Question: ", "assistant": "Answer: "}
        return "\n\n".join(titles.get(m["role"], "") + m["content"] for m in messages) + "\n\nAnswer:"
    told = [dict(message) for message in messages]
    more = {"tools": [dict(tool) for tool in tools]} if tools else {}
    try:
        text: str = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True, **more)
    except Exception as error:  # templates raise what they like: roles in a wrong order, say
        raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
    return text


def hash_of(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary and rules: 32 hexadecimal digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
