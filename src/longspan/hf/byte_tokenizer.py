"""A tokenizer of bytes: token ids 0 to 255 are the bytes of UTF-8, special tokens follow; nothing is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def byte_tokenizer(special: Sequence[str], *, end: str, template: str) -> Any:
    """Return it as transformers' fast tokenizer.

    Args:
        special: tokens from id 256 on.
        end: the one that ends an answer.
        template: makes a conversation into text, in Jinja.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, clean_up_tokenization_spaces=False, chat_template=template
    )


def _letter(byte: int) -> str:
    """Return the character that stands for a byte in byte-level tokenizers: itself where it can be seen."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in shown:
        return chr(byte)
    hidden = [each for each in range(256) if each not in shown]
    return chr(256 + hidden.index(byte))
