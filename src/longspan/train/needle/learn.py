"""Training the needle model from nothing, and folders that hold it.

Attention is dense while it learns (short sequences fit any window whole); which regions to search is taught afterwards,
with the weights frozen, as for any checkpoint (`train/convert.py`). The loss counts answers' tokens, and the text's a
little. It does not know how sequences are made (`tasks.py`), or which sizes and lengths serve (`recipe.py`).
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.errors import ModelError
from longspan.hf.training import hidden_states, new_hybrid
from longspan.train.data import Example
from longspan.train.needle import tasks
from longspan.train.needle.recipe import SIZES, Recipe
from longspan.train.needle.tasks import Mix, Sequence_
from longspan.train.readers import dense

_MOST, _KEPT = 256, 16384
"""Sequences of a step; tokens of a step up to which layers are kept for its backward pass."""


class Learn:
    """The task (`train.loop.Task`)."""

    def __init__(
        self,
        recipe: Recipe,
        haystack: bytes,
        device: torch.device,
        *,
        start: Path | None = None,
        compiled: bool = False,
    ) -> None:
        """Make a model.

        Args:
            recipe: how it is trained.
            haystack: real text.
            device: where; on a GPU products are in bfloat16, weights in float32.
            start: a folder that `save` wrote, whose weights it begins with; None: random ones.
            compiled: whether torch.compile makes its forward: faster on a GPU, after a minute for each length.
        """
        self.recipe, self.haystack, self.device = recipe, haystack, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model: Any = new_hybrid(SIZES[recipe.size].fields()).to(device)
        if start is not None:
            _begin(self.model, start)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.identity: dict[str, Any] = json.loads(
            json.dumps({"stage": "needle", **asdict(recipe), "text": len(haystack), "start": start and str(start)})
        )
        self._forward = torch.compile(self._hidden) if compiled else self._hidden

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """See `train.loop.Task`."""
        phase = self.recipe.phase(done)
        count = max(1, min(_MOST, self.recipe.batch // phase.length))
        mix = Mix(text=phase.text, density=phase.density)
        seeds = (self.recipe.seed << 32) % tasks.HELD_OUT + step * 4096
        made = [tasks.make(seeds + i, phase.length, self.haystack, mix) for i in range(count)]
        ids, weights = batched(made, phase.length, self.recipe.text_weight)
        ids, weights = ids.to(self.device), weights.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model.lm_head(self._forward(ids)).float()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        with torch.no_grad():
            asked = weights == 1.0
            right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).flatten()[asked].float().mean()
        row = {"length": float(phase.length), "token": float(right)}
        return (losses * weights).sum() / weights.sum(), row, ids.numel()

    def _hidden(self, ids: Tensor) -> Tensor:
        scale = float(self.model.config.head_dim) ** -0.5
        again = ids.numel() > _KEPT  # beyond, what layers keep for the backward pass would fill a GPU
        return hidden_states(self.model, ids, lambda _, q, k, v: dense(q, k, v, scale, None), again=again)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the model in bfloat16, with its tokenizer, as transformers reads it."""
        from longspan.hf.byte_tokenizer import byte_tokenizer

        self.model.config.longspan_training = about
        state = {name: p.detach().to(torch.bfloat16) for name, p in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=state)
        byte_tokenizer(["<|start|>", "<|ask|>", "<|end|>"], end="<|end|>").save_pretrained(folder)


def _begin(model: Any, folder: Path) -> None:
    """Give a model the weights of a folder (ModelError: it is of another size, or holds none)."""
    from safetensors import SafetensorError

    wrong = ModelError(f"{folder} holds no model of this recipe's size: name the folder model of its --out")
    if not (folder / "model.safetensors").is_file():
        raise wrong
    try:
        # Tensors have other names in files of nemotron_h than in its modules: transformers knows which.
        begun, found = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model.load_state_dict(begun.state_dict())
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise wrong from error
    if found["missing_keys"]:
        raise wrong


class Questions:
    """Sequences as examples for routing queries (`train.data.Source`): rows that answer are looked at."""

    def __init__(self, haystack: bytes, mix: Mix) -> None:
        """Take real text and how sequences are made up."""
        self.haystack, self.mix = haystack, mix
        self.tokens = torch.frombuffer(bytearray(haystack), dtype=torch.uint8).to(torch.int32)

    def draw(self, seed: int, length: int, *, rows: int = 64, asked: float = 0.5) -> Example:
        """See `Texts.draw`; all are asked about."""
        made = tasks.make(seed % tasks.HELD_OUT, length, self.haystack, self.mix)
        ids, weights = batched([made], length, 0.1)
        answering = (weights[0] == 1.0).nonzero().flatten() - 1
        chosen = torch.randperm(answering.numel(), generator=torch.Generator().manual_seed(seed))[:rows]
        return Example(ids[0], weights[0], answering[chosen].sort().values)


def batched(made: list[Sequence_], length: int, text_weight: float) -> tuple[Tensor, Tensor]:
    """Return ids and weights `[B, length]`; what is missing at the ends counts nothing."""
    ids = torch.full((len(made), length), tasks.END, dtype=torch.int64)
    weights = torch.zeros(len(made), length)
    for row, sequence in enumerate(made):
        count = min(length, len(sequence.tokens))
        ids[row, :count] = torch.tensor(sequence.tokens[:count])
        weights[row, 1:count] = text_weight
        for asked in sequence.asked:
            weights[row, asked.start : asked.start + len(asked.answer)] = 1.0
    return ids, weights


@torch.no_grad()
def right(model: Any, sequences: list[Sequence_], attend: Any) -> list[tuple[str, float, bool]]:
    """Return `(kind, depth, whether the whole answer is the likeliest)` of every question.

    Args:
        model: a `NemotronHForCausalLM`.
        sequences: of seeds that training never sees (`tasks.HELD_OUT`).
        attend: see `hf.training.Attend`.
    """
    found = []
    for sequence in sequences:
        ids = torch.tensor([sequence.tokens], device=model.device)
        logits = model.lm_head(hidden_states(model, ids, attend))[0]
        said = logits.argmax(-1).tolist()
        for asked in sequence.asked:
            told = tuple(said[asked.start - 1 : asked.start - 1 + len(asked.answer)])
            found.append((asked.kind, asked.depth, told == asked.answer))
    return found


def held_out(count: int, length: int, haystack: bytes, mix: Mix, *, seed: int = 0) -> list[Sequence_]:
    """Return sequences for evaluation."""
    rng = random.Random(seed)
    return [tasks.make(tasks.HELD_OUT + rng.getrandbits(38), length, haystack, mix) for _ in range(count)]
