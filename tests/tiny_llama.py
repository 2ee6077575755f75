"""A tiny llama with random weights and a tokenizer trained on a few sentences, saved as transformers saves models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = (
    "The harbour board met in May. The code of the gate is 7315. Lise keeps the spare key, and Tom the other one. "
    "Nobody had asked for a lantern. The ferry to Oslo leaves from pier 12, and the one to Riga does not leave at all. "
)

WINDOW, CHUNK = 1024, 128
"""Of the model that the engine's tests share; tokens read together there (512 otherwise)."""
SPECS = (
    "dense",
    "streaming:window=100,sinks=4",
    "superlinear:window=80,spans=2",
    "retrieval:window=128,pages=2",
    "retrieval:window=128,pages=2,read=place",
)
"""A way of attending of every kind, small enough for a thousand tokens to be a long context."""


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCES], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, *, seed: int = 0, template: str | None = TEMPLATE, **config: Any) -> Path:
    """Three layers, 4 query heads, 2 KV heads of 8; weights so large that attention is far from uniform."""
    fast = save_tokenizer(folder, template)
    sizes: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": fast.eos_token_id,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).save_pretrained(folder)
    return folder
