"""Training the needle model from nothing, and folders that hold it.

Attention is dense while it learns, or dense within segments (`attending.py`), and once it finds anything, where
superlinear has to search is learnt with it. The loss is that of answers, the text's a little, and that of searching.
It does not know how sequences are made (`tasks.py`), or which sizes and lengths serve (`recipe.py`).
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

from longspan.engine import prompts
from longspan.errors import ModelError
from longspan.hf import routing as routes
from longspan.hf.routing import Routing
from longspan.hf.training import hidden_states, new_hybrid
from longspan.train.data import Example
from longspan.train.needle import tasks
from longspan.train.needle.attending import SINKS, Attending
from longspan.train.needle.batches import ANSWER, TEXT, Batches, answering, batched
from longspan.train.needle.recipe import SIZES, Phase, Recipe
from longspan.train.needle.tasks import Mix

_FEW = 64
"""A step's answers count as if they were so many tokens more: a few are a poor sample, and must not move as much."""
_TAUGHT = f"superlinear:sinks={SINKS}"


class Learn:
    """The task (`train.loop.Task`)."""

    def __init__(
        self,
        recipe: Recipe,
        haystack: bytes,
        device: torch.device,
        *,
        start: Path | None = None,
        workers: int = 0,
    ) -> None:
        """Make a model.

        Args:
            recipe: how it is trained.
            haystack: real text.
            device: where; on a GPU products are in bfloat16, weights in float32.
            start: a folder that `save` wrote, whose weights and routing queries it begins with; None: random ones.
            workers: processes that make batches ahead.
        """
        self.recipe, self.device = recipe, device
        size = SIZES[recipe.size]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model: Any = new_hybrid(size.fields()).to(device)
        source = torch.Generator().manual_seed(recipe.seed)
        begun = routes.begin(size.layers.count("*"), size.heads * size.head_dim, recipe.rank, source)
        if start is not None:
            begun = _begin(self.model, start, begun)
        self.routing = [Routing(*(x.detach().to(device).requires_grad_() for x in (r.down, r.up))) for r in begun]
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        for layer, each in enumerate(self.routing):
            self.parameters |= {f"routing.{layer}.down": each.down, f"routing.{layer}.up": each.up}
        self.identity: dict[str, Any] = json.loads(
            json.dumps({"stage": "needle", **asdict(recipe), "text": len(haystack), "start": start and str(start)})
        )
        self.batches = Batches(haystack, recipe.seed, recipe.batch, workers=workers)

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """See `train.loop.Task`."""
        phase, to = self.recipe.phase(done), self.device
        made = self.batches.get(step, phase)
        ids, marks = made.ids.to(to, non_blocking=True), made.marks.to(to, non_blocking=True)[:, 1:]
        attending = self._attending(step, phase, made.rows.to(to, non_blocking=True))
        with torch.autocast(to.type, torch.bfloat16, enabled=to.type == "cuda"):
            logits = self.model.lm_head(hidden_states(self.model, ids, attending)).float()[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(marks.shape)
        asked, text = marks == ANSWER, marks == TEXT
        loss = (losses * asked).sum() / (asked.sum() + _FEW)
        loss = loss + self.recipe.text_weight * (losses * text).sum() / text.sum().clamp(min=1)
        if attending.losses:
            loss = loss + phase.searching * torch.stack(attending.losses).mean()
        else:  # nothing learns to search yet, which is a gradient of zero
            loss = loss + 0.0 * sum(part.sum() for each in self.routing for part in (each.down, each.up))
        with torch.no_grad():
            right = ((logits.argmax(-1) == ids[:, 1:]) & asked).sum() / asked.sum().clamp(min=1)
            told = torch.stack([right.float(), *attending.found]).tolist()
        row = {"length": float(phase.length), "searched" if attending.sparse else "token": told[0]}
        if attending.found:
            row["found"] = sum(told[1:]) / len(told[1:])
            row["best_layer"] = max(told[1:])
        return loss, row, ids.numel()

    def _attending(self, step: int, phase: Phase, rows: Tensor) -> Attending:
        """Return how a step attends: segments, and how far apart anchors are, follow from its number."""
        rng, split = random.Random(f"{self.recipe.seed} {step}"), phase.length - phase.asked
        segment = rng.choice(phase.segments) if phase.segments else 0
        near = int(min(64 * 32 ** rng.random(), phase.length / 8))
        stretch = min(8 ** rng.random(), phase.length**0.5 / 8)
        made = Attending(split, segment or split, float(self.model.config.head_dim) ** -0.5, near=near, stretch=stretch)
        if phase.searching:
            made.routing, made.rows, made.sparse = self.routing, rows, rng.random() < phase.sparse
        return made

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the model in bfloat16, with its tokenizer, as transformers reads it, and its routing queries beside it.

        These are an adapter, in the folder `routed` of the folder.
        """
        from longspan.hf.adapter import Adapter
        from longspan.hf.byte_tokenizer import byte_tokenizer
        from longspan.hf.loading import load

        self.model.config.longspan_training = about
        state = {name: p.detach().to(torch.bfloat16) for name, p in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=state)
        byte_tokenizer(["<|start|>", "<|ask|>", "<|end|>"], end="<|end|>", template=_template()).save_pretrained(folder)
        fingerprint = load(str(folder), device="cpu").fingerprint
        Adapter(fingerprint, _TAUGHT, tuple(self.routing), about=about).save(folder / ROUTED)


ROUTED = "routed"


def _template() -> str:
    """Return a chat template by which the engine asks as training did: a text, then names to be looked up."""
    before, after = (json.dumps(words) for words in (prompts.BEFORE, prompts.AFTER))
    asked = f"message.content | replace({before}, '<|start|>') | replace({after}, '<|ask|>')"
    return (
        "{%- for message in messages -%}{%- if message.role == 'user' -%}"
        f"{{%- if {after} not in message.content -%}}<|ask|>{{%- endif -%}}{{{{- {asked} -}}}}="
        "{%- elif message.role == 'assistant' -%}{{- message.content -}}<|end|>{%- endif -%}{%- endfor -%}"
    )


def _begin(model: Any, folder: Path, routing: list[Routing]) -> list[Routing]:
    """Give a model the weights of a folder; return its routing queries, or those given where it has none.

    Raises:
        ModelError: the folder's model is of another size, or there is none.
    """
    from safetensors import SafetensorError

    from longspan.hf.adapter import CONFIG, read

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
    if not (folder / ROUTED / CONFIG).is_file():
        return routing
    kept = list(read(folder / ROUTED).routing or ())
    if [each.up.shape for each in kept] != [each.up.shape for each in routing]:
        raise wrong
    return kept


class Questions:
    """Sequences as examples for a mechanism (`train.data.Source`): rows that answer are looked at."""

    def __init__(self, haystack: bytes, mix: Mix) -> None:
        """Take real text and how sequences are made up."""
        self.haystack, self.mix = haystack, mix
        self.tokens = torch.frombuffer(bytearray(haystack), dtype=torch.uint8).to(torch.int32)

    def draw(self, seed: int, length: int, *, rows: int = 64, asked: float = 0.5) -> Example:
        """See `Texts.draw`; all are asked about."""
        ids, marks = batched([tasks.make(seed % tasks.HELD_OUT, length, self.haystack, self.mix)], length)
        weights = torch.tensor([0.0, 0.1, 1.0])[torch.from_numpy(marks[0]).long()]
        looked = torch.from_numpy(answering(marks, rows)[0]).unique()
        return Example(torch.from_numpy(ids[0]).long(), weights, looked)
