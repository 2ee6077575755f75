"""Teaching a model positions beyond its window: other rotations, and texts whose positions skip.

Rotations: `yarn` (arXiv 2309.00071: slow channels are stretched, fast ones stay) or `base` (a greater base, so that the
slowest channel turns no further than before: base * factor^(d / (d - 2))). Texts of at most `length` tokens are given
positions up to the new window by leaving some out (PoSE, arXiv 2309.10400): a text is cut into two to four pieces, and
each begins a random distance behind the one before; a quarter of the texts skip nothing. Low-rank changes of the linear
layers learn to predict under them. What comes out is an adapter. It does not know the command line.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.errors import Cancelled, ModelError, UsageError
from longspan.hf.adapter import Adapter, rotate
from longspan.hf.model import CausalModel
from longspan.hf.training import states, token_losses
from longspan.train import loop
from longspan.train.data import Texts
from longspan.train.lora import Lora
from longspan.train.optimiser import Rates
from longspan.train.readers import Placed

ROTATIONS = ("yarn", "base")


@dataclass(frozen=True)
class Options:
    """How a model is extended."""

    to: int
    """Positions of the new window."""
    rotation: str = "yarn"
    lora: int = 16
    """Rank of the changes."""
    length: int = 4096
    """Longest text of a step, in tokens."""
    rate: float = 2e-4
    asked: float = 0.5
    """Share of texts that end in questions about facts in them."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can't be."""
        if self.rotation not in ROTATIONS:
            raise UsageError(f"--rotation {self.rotation} is unknown: use {' or '.join(ROTATIONS)}")
        if self.lora < 1 or self.length < 64 or not self.rate > 0 or not 0 <= self.asked <= 1:
            raise UsageError("--lora must be at least 1, --length 64, --rate above 0, and --asked between 0 and 1")


class Extend:
    """The task: see the module."""

    def __init__(self, model: CausalModel, texts: Texts, options: Options) -> None:
        """Take a model, which is changed in memory (ModelError, UsageError: it can't be extended so)."""
        self.options, self.texts = options, texts
        window = model.dimensions.window
        if options.to <= window:
            raise UsageError(f"{model.name} reads {window} tokens already: give a --to above that")
        self.base = model.fingerprint
        self.rope = rope(model, options)
        rotate(model.model, self.rope)
        model.config.max_position_embeddings = options.to
        self.before = model.adapter
        self.model = CausalModel(model.name, model.model, model.tokenizer, native=False)
        if self.model.rotary is None:
            raise ModelError(f"{model.name} encodes no positions by rotation: there is nothing to extend")
        self.rotary = self.model.rotary
        self.model.model.requires_grad_(False)
        self.lora = Lora(self.model.model, options.lora, options.seed)
        self.parameters = self.lora.parameters
        self.identity: dict[str, Any] = {"stage": "extend", "model": self.base, **asdict(options)}

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """See `loop.Task`."""
        rng, options, device = random.Random(f"{self.options.seed} {step}"), self.options, self.model.device
        length = max(64, int(options.length * rng.choice((0.25, 0.5, 1.0, 1.0))))
        example = self.texts.draw(rng.getrandbits(40), length, asked=options.asked)
        ids, weights = example.tokens.unsqueeze(0).to(device), example.weights.to(device)
        reader = Placed(skipping(rng, ids.shape[1], options.to).to(device), self.rotary)
        found = states(self.model, ids, reader, again=device.type == "cuda")
        losses = token_losses(self.model.model, found, ids)[0]
        return (losses * weights[1:]).sum() / weights[1:].sum(), {}, ids.numel()

    def adapter(self) -> Adapter:
        """Return what was learnt so far."""
        made = Adapter(
            self.base, lora=self.lora.pairs(), window=self.options.to, rope=self.rope, about=dict(self.identity)
        )
        return made.over(self.before).to(torch.device("cpu"))


def rope(model: CausalModel, options: Options) -> dict[str, Any]:
    """Return transformers' `rope_parameters` of the extended model (ModelError: it is extended already)."""
    known = dict(getattr(model.config, "rope_parameters", None) or {})
    if known.get("rope_type", "default") != "default" or "rope_theta" not in known:
        raise ModelError(f"{model.name} does not rotate plainly: only models with one base are extended")
    factor, dim = options.to / model.dimensions.window, model.dimensions.head_dim
    if options.rotation == "base":
        return known | {"rope_theta": float(known["rope_theta"]) * factor ** (dim / (dim - 2))}
    return known | {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": model.dimensions.window,
    }  # fmt: skip


def skipping(rng: random.Random, count: int, to: int) -> Tensor:
    """Return int64 `[count]` ascending positions below `to`: pieces, each a random distance behind the one before."""
    positions = torch.arange(count)
    spare = to - count
    if spare <= 0 or rng.random() < 0.25:
        return positions
    cuts = sorted(rng.sample(range(1, count), min(count - 1, rng.randint(1, 3))))
    # Sorted draws from one range: pieces are pushed as far as the sum of the distances, which never passes the end.
    for cut, pushed in zip(cuts, sorted(rng.randint(0, spare) for _ in cuts), strict=True):
        positions[cut:] = torch.arange(cut, count) + pushed
    return positions


def extend(
    model: CausalModel,
    text: str | Texts,
    out: Path,
    seconds: float,
    options: Options,
    *,
    tell: loop.Tell = lambda _: None,
) -> Adapter:
    """Teach a model a longer window; write the adapter and its curves to a folder, which a stopped run goes on from.

    Args:
        model: is changed in memory.
        text: to learn from, or where examples come from.
        out: the folder.
        seconds: of training in all.
        options: how.
        tell: gets lines of progress.

    Raises:
        UsageError, ModelError: texts too short, or a model that can't be extended so.
        Cancelled: Ctrl-C; the folder holds the adapter as far as it was trained.
        SaveError: the folder can't be written.
    """
    from longspan.train.curves import draw

    task = Extend(model, Texts(model, text) if isinstance(text, str) else text, options)
    try:
        loop.train(task, out / "extend", loop.Budget(seconds), Rates(rest=options.rate), muon=False, tell=tell)
    except Cancelled:
        task.adapter().save(out)
        raise
    adapter = task.adapter()
    adapter.save(out)
    draw(out / "extend" / loop.LOG, out / "curves.png")
    return adapter
