"""kvpress (NVIDIA): what its presses keep of a context, and what the model then says, token by token.

It takes a folder of a model, a number type and a device. It is asked
`{"press": NAME, "ratio": r, "tokens": [...], "score": [[...], ...], "ask": [{"tokens": [...], "max_tokens": n,
"outputs": [...]}, ...]}`: the context is read with the press at 1/r of its keys; each text of `score` is then read
after it and taken back, and each question of `ask` answered greedily and taken back. An answer ends early once it
contains every output, where nothing more could raise its score. It answers with the bytes kept; for each text the sum
of negative log-likelihoods (of all its tokens but the first) and the likeliest token after each; and the answers'
tokens. Positions go on from the context's own length, as in kvpress' pipeline.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from typing import Any

import torch


def presses() -> dict[str, Callable[[float], Any]]:
    """Return the presses that are asked for by name, each a function of the share of keys that it removes."""
    import kvpress as library  # type: ignore[import-not-found]  # only in its own environment

    return {
        "knorm": library.KnormPress,
        "streaming_llm": library.StreamingLLMPress,
        "snapkv": library.SnapKVPress,
        "pyramidkv": library.PyramidKVPress,
        "tova": library.TOVAPress,
        "keydiff": library.KeyDiffPress,
        "lagkv": library.LagKVPress,
        "expected_attention": library.ExpectedAttentionPress,
        "observed_attention": library.ObservedAttentionPress,
        "ada_snapkv": lambda share: library.AdaKVPress(library.SnapKVPress(share)),
        "ada_expected_attention": lambda share: library.AdaKVPress(library.ExpectedAttentionPress(share)),
        "kvzip": library.KVzipPress,
    }


class Model:
    """A model of transformers, with what a press left of its cache."""

    def __init__(self, folder: str, dtype: str, device: str) -> None:
        """Load it."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        bars: Any = logging
        bars.disable_progress_bar()
        load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
        self.device = torch.device(device)
        self.model = load(folder, dtype=getattr(torch, dtype)).to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer one line of standard input."""
        from transformers import DynamicCache

        name, ratio = asked["press"], asked["ratio"]
        cache = DynamicCache()
        # What observes attention needs it written out; the others are told to transformers' fastest.
        self.model.set_attn_implementation("eager" if name == "observed_attention" else "sdpa")
        press = presses()[name](1 - 1 / ratio) if name else None
        context = torch.tensor([asked["tokens"]], device=self.device)
        with press(self.model) if press else contextlib.nullcontext():
            self.model.model(input_ids=context, past_key_values=cache)
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if name.startswith("ada_") or name == "kvzip":
            kept = round(kept / ratio)  # these mask what they remove, and would free it elsewhere
        length = context.shape[1]
        scores = [self.score(cache, length, tokens) for tokens in asked["score"]]
        answers = [
            self.generate(cache, length, each["tokens"], each["max_tokens"], each["outputs"]) for each in asked["ask"]
        ]
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None
        return {"bytes": kept, "scores": scores, "answers": answers}

    def score(self, cache: Any, length: int, tokens: list[int]) -> dict[str, Any]:
        """Read a text after the context, and take it back."""
        with self.taken_back(cache):
            logits = self.forward(cache, length, tokens, len(tokens)).float()
        nll = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(tokens[1:], device=self.device), reduction="sum"
        )
        return {"nll": float(nll), "likeliest": logits.argmax(-1).tolist()}

    def generate(self, cache: Any, length: int, tokens: list[int], most: int, outputs: list[str]) -> list[int]:
        """Answer a question greedily, and take both back."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        written: list[int] = []
        with self.taken_back(cache):
            token = int(self.forward(cache, length, tokens, 1)[-1].argmax())
            while token not in ends and len(written) < most:
                written.append(token)
                text = self.tokenizer.decode(written, skip_special_tokens=True).casefold()
                if all(output.casefold() in text for output in outputs):
                    break
                token = int(self.forward(cache, length + len(tokens) + len(written) - 1, [token], 1)[-1].argmax())
        return written

    def forward(self, cache: Any, position: int, tokens: list[int], logits: int) -> torch.Tensor:
        """Return the logits of the last positions."""
        at = torch.arange(position, position + len(tokens), device=self.device).unsqueeze(0)
        out = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            past_key_values=cache,
            position_ids=at,
            logits_to_keep=logits,
        )
        found: torch.Tensor = out.logits[0]
        return found

    @contextlib.contextmanager
    def taken_back(self, cache: Any) -> Any:
        """Cut every layer back to the length it has now."""
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        try:
            yield
        finally:
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


def main() -> None:
    """Load the model, say so, and answer until standard input ends."""
    model, known = Model(*sys.argv[1:4]), presses()
    say({name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["press"] and asked["press"] not in known:
            say({"error": f"unknown press {asked['press']!r}: use {', '.join(known)}"})
            continue
        say(model.answer(asked))


def say(answer: dict[str, Any]) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
