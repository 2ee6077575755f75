"""A tokenizer alone, without its model: what is needed to count the tokens of a model that runs elsewhere.

It does not know who runs the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any


class Tokenizer:
    """A tokenizer from transformers and its chat template."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        """Take a transformers tokenizer."""
        self.name, self.tokenizer = name, tokenizer

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens added at its ends."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """See `chat_of`."""
        return chat_of(self.tokenizer, messages)

    @cached_property
    def tokenizer_hash(self) -> str:
        """See `hash_of`."""
        return hash_of(self.tokenizer)


def chat_of(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Return a conversation as text in a tokenizer's own chat template, ready for the model's answer.

    One without a template gets plain paragraphs that end in `Answer:`.
    """
    if not tokenizer.chat_template:
        titles = {"system": "", "user": "Question: ", "assistant": "Answer: "}
        return "\n\n".join(titles.get(m["role"], "") + m["content"] for m in messages) + "\n\nAnswer:"
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return text


def hash_of(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary and rules: 32 hexadecimal digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
