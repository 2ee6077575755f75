"""Who else runs the same weights: transformers by itself, with PyTorch's attention and its own cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from longspan.bench.long.checks import random_tokens
from longspan.bench.timing import spread
from longspan.hf.model import CausalModel
from longspan.hf.plain import plainly

PEERS = ("transformers",)
_STEPS, _BATCHES = 8, 5
CHUNKS = (131072, 65536, 16384, 4096, 2048)
"""Tokens that it reads together: as many as it has memory for (a hybrid's fallback kernels have for few)."""


@torch.inference_mode()
def row(model: CausalModel, side: str, length: int, seed: int) -> dict[str, Any]:
    """Return the figures of transformers at a context (torch.OutOfMemoryError: it has no room for it)."""
    assert side in PEERS, side
    for chunk in CHUNKS:
        try:
            return _row(model, length, min(chunk, length), seed)
        except torch.OutOfMemoryError:
            if chunk == CHUNKS[-1]:
                raise
            torch.cuda.empty_cache()
    raise AssertionError("some chunk was tried")


def _row(model: CausalModel, length: int, chunk: int, seed: int) -> dict[str, Any]:
    device = model.device
    ids = torch.tensor([random_tokens(model, length, seed)], device=device)
    with plainly(model) as plain:
        plain(ids[:, :16], use_cache=False, logits_to_keep=1)  # what is loaded on first use is no part of it
        _wait(device)
        started = time.perf_counter()
        cache = None
        for start in range(0, length, chunk):
            out = plain(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
        token = int(out.logits[0, -1].argmax())
        seconds = time.perf_counter() - started
        rates = []
        for _ in range(_BATCHES):
            started = time.perf_counter()
            for _ in range(_STEPS):
                out = plain(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True)
                token = int(out.logits[0, -1].argmax())
            rates.append(_STEPS / (time.perf_counter() - started))
    peak = {"peak": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else None
    return {
        "prefill_tokens_per_s": length / seconds,
        "first_token_s": seconds,
        "read": "whole",
        "chunk": chunk,
        "decode_tokens_per_s": spread(rates),
        "memory": peak,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
