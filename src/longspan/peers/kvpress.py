"""kvpress (NVIDIA): what its presses keep of contexts, and what the model then says, token by token.

It takes a folder of a model, a number type and a device. It is asked `{"press": NAME, "ratio": r, "cases": [...]}`,
each case `{"tokens": [...], "score": [[...], ...], "ask": {"tokens": [...], "max_tokens": n, "outputs": [...]}}`, `ask`
null where nothing is asked: the context is read with the press at 1/r of its keys; each text of `score` is then read
after it and taken back, and the question answered greedily. Answers are written together, a token of each in one pass,
from caches that are stacked and padded in front; one ends early once it contains every output, where nothing more could
raise its score. It answers with `{"cases": [...]}`, of each the bytes kept; for each text the sum of negative
log-likelihoods (of all its tokens but the first) and the likeliest token after each; and the answer's tokens. Positions
go on from the context's own length, as in kvpress' pipeline.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TOGETHER = 16
"""Answers that are written together: their caches are held twice while they are stacked."""


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
        found: list[dict[str, Any]] = []
        waiting: list[Waiting] = []
        for case in asked["cases"]:
            cache, nbytes = self.read(case["tokens"], asked["press"], asked["ratio"])
            length = len(case["tokens"])
            scores = [self.score(cache, length, tokens) for tokens in case["score"]]
            found.append({"bytes": nbytes, "scores": scores, "answer": []})
            if case["ask"]:
                waiting.append(self.begin(cache, length, case["ask"], found[-1]["answer"]))
            if len(waiting) == TOGETHER:
                self.write(waiting)
                waiting = []
        if waiting:
            self.write(waiting)
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None
        return {"cases": found}

    def read(self, tokens: list[int], name: str, ratio: float) -> tuple[Any, int]:
        """Read a context with a press; returns what it left, and its bytes."""
        from transformers import DynamicCache

        cache = DynamicCache()
        # What observes attention needs it written out; the others are told to transformers' fastest.
        self.model.set_attn_implementation("eager" if name == "observed_attention" else "sdpa")
        press = presses()[name](1 - 1 / ratio) if name else None
        with press(self.model) if press else contextlib.nullcontext():
            self.model.model(input_ids=torch.tensor([tokens], device=self.device), past_key_values=cache)
        self.model.set_attn_implementation("sdpa")
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        if name.startswith("ada_") or name == "kvzip":
            kept = round(kept / ratio)  # these mask what they remove, and would free it elsewhere
        return cache, kept

    def score(self, cache: Any, length: int, tokens: list[int]) -> dict[str, Any]:
        """Read a text after the context, and take it back."""
        with self.taken_back(cache):
            logits = self.after(cache, length, tokens, len(tokens)).float()
        nll = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(tokens[1:], device=self.device), reduction="sum"
        )
        return {"nll": float(nll), "likeliest": logits.argmax(-1).tolist()}

    def begin(self, cache: Any, length: int, asked: dict[str, Any], answer: list[int]) -> Waiting:
        """Read a question; its first token is the answer's beginning."""
        token = int(self.after(cache, length, asked["tokens"], 1)[-1].argmax())
        masked = [getattr(layer.self_attn, "masked_key_indices", None) for layer in self.model.model.layers]
        return Waiting(
            cache, length + len(asked["tokens"]), masked, token, asked["max_tokens"], asked["outputs"], answer
        )

    def write(self, waiting: list[Waiting]) -> None:
        """Write the answers of these questions, a token of each at a time."""
        cache, pads = self.stacked(waiting)
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        going = {i for i, each in enumerate(waiting) if each.token not in ends}
        for step in range(max(each.most for each in waiting)):
            for i in list(going):
                each = waiting[i]
                each.answer.append(each.token)
                if len(each.answer) == each.most or self.complete(each):
                    going.discard(i)
            if not going:
                return
            tokens, at = [[each.token] for each in waiting], [[each.length + step] for each in waiting]
            for each, found in zip(waiting, self.forward(cache, at, tokens, 1, pads)[:, -1].argmax(-1), strict=True):
                each.token = int(found)
            going = {i for i in going if waiting[i].token not in ends}

    def stacked(self, waiting: list[Waiting]) -> tuple[Any, list[list[int]]]:
        """Return the caches of several contexts as one, giving up what they were, and each layer's padding in front."""
        from transformers import DynamicCache

        cache, padding = DynamicCache(), []
        for i, layer in enumerate(self.model.model.layers):
            own = [each.cache.layers[i] for each in waiting]
            longest = max(each.keys.shape[2] for each in own)
            pads = [longest - each.keys.shape[2] for each in own]
            keys, values = (
                torch.cat(
                    [torch.nn.functional.pad(each, (0, 0, pad, 0)) for each, pad in zip(parts, pads, strict=True)]
                )
                for parts in zip(*((each.keys, each.values) for each in own), strict=True)
            )
            cache.update(keys, values, i)
            for each in own:
                each.keys = each.values = None
            layer.self_attn.masked_key_indices = masks([each.masked[i] for each in waiting], pads)
            padding.append(pads)
        return cache, padding

    def complete(self, each: Waiting) -> bool:
        """Whether an answer contains every output."""
        text = self.tokenizer.decode(each.answer, skip_special_tokens=True).casefold()
        return all(output.casefold() in text for output in each.outputs)

    def forward(
        self, cache: Any, at: list[list[int]], tokens: list[list[int]], logits: int, pads: list[list[int]]
    ) -> torch.Tensor:
        """Return the logits of the last positions, `[B, logits, V]`; `pads`: each layer's padding before each context.

        Layers may hold different numbers of keys, which transformers has no mask for: each gets its own.
        """
        known: dict[Any, torch.Tensor] = {}
        new = len(tokens[0])

        def seen(layer: int) -> torch.Tensor:
            held = cache.layers[layer].keys.shape[2]
            if (held, tuple(pads[layer])) not in known:
                key = torch.arange(held + new, device=self.device)
                pad = torch.tensor(pads[layer], device=self.device)[:, None, None, None]
                known[held, tuple(pads[layer])] = (key >= pad) & (key <= key[held:, None])
            return known[held, tuple(pads[layer])]

        def hook(layer: int) -> Callable[..., Any]:
            return lambda _, given, named: (given, {**named, "attention_mask": seen(layer)})

        layers = self.model.model.layers
        hooks = [layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
        try:
            out = self.model(
                input_ids=torch.tensor(tokens, device=self.device),
                past_key_values=cache,
                position_ids=torch.tensor(at, device=self.device),
                attention_mask=seen(0),
                logits_to_keep=logits,
            )
        finally:
            for each in hooks:
                each.remove()
        found: torch.Tensor = out.logits
        return found

    def after(self, cache: Any, length: int, tokens: list[int], logits: int) -> torch.Tensor:
        """Return the logits `[logits, V]` of the last of some tokens after one context."""
        at = list(range(length, length + len(tokens)))
        return self.forward(cache, [at], [tokens], logits, [[0]] * len(cache.layers))[0]

    @contextlib.contextmanager
    def taken_back(self, cache: Any) -> Any:
        """Cut every layer back to the length it has now."""
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        try:
            yield
        finally:
            for layer, length in zip(cache.layers, lengths, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]


@dataclass
class Waiting:
    """A question that was read, and its answer so far."""

    cache: Any
    length: int
    """Tokens of context and question."""
    masked: list[Any]
    """Of each layer the keys that a press masks: index tensors of batch, head and place; None: none."""
    token: int
    """What comes next."""
    most: int
    outputs: list[str]
    answer: list[int]


def masks(masked: list[Any], pads: list[int]) -> Any:
    """Return the masked keys of one layer of stacked contexts; None: none."""
    if all(each is None for each in masked):
        return None
    parts = [
        (torch.full_like(heads, number), heads, places + pad)
        for number, (each, pad) in enumerate(zip(masked, pads, strict=True))
        if each is not None
        for _, heads, places in [each]
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def main() -> None:
    """Load the model, say so, and answer until standard input ends."""
    model, known = Model(*sys.argv[1:4]), presses()
    say({name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["press"] and asked["press"] not in known:
            say({"error": f"unknown press {asked['press']!r}: use {', '.join(known)}"})
            continue
        try:
            found = model.answer(asked)
        except Exception as error:  # one press that fails ends no others
            found = {"error": f"{asked['press']}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        say(found)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(answer: dict[str, Any]) -> None:
    """Write one line of JSON."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
