"""Teaching an ordinary checkpoint a mechanism: what it needs beside the weights, and then, if wanted, the weights.

Stage 1, the model frozen and dense: superlinear's routing queries learn where attention looks (`distil.py`), infini's
gates how much of the memory helps to give what dense attention gives. Stage 2 (`lora` > 0): the mechanism is switched
on and low-rank changes of the linear layers learn to predict the text, and the answers, under it. Both write the same
kind of adapter. It does not know the command line.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.attention.infini import Infini
from longspan.attention.superlinear import Superlinear
from longspan.errors import UsageError
from longspan.hf import routing as routes
from longspan.hf.adapter import Adapter
from longspan.hf.attention import Enough
from longspan.hf.model import CausalModel
from longspan.hf.routing import Routing
from longspan.hf.training import states, token_losses
from longspan.train import loop
from longspan.train.data import Source, Texts
from longspan.train.lora import Lora
from longspan.train.optimiser import Rates
from longspan.train.readers import Distilling, Gating, Learning

TAUGHT = ("superlinear", "infini")
"""Mechanisms that stage 1 has something to teach."""


@dataclass(frozen=True)
class Options:
    """How a model is converted."""

    rank: int = 16
    """Of routing queries."""
    lora: int = 0
    """Of the changes of stage 2; 0: there is no stage 2."""
    length: int = 4096
    """Longest text of a step, in tokens; each takes from a quarter of it to all."""
    rows: int = 64
    """Queries of a text that stage 1 compares."""
    rate: float = 1e-3
    """Learning rate of stage 1, and ten times that of stage 2."""
    asked: float = 0.5
    """Share of texts that end in questions about facts in them."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        for name, least in (("rank", 1), ("lora", 0), ("length", 64), ("rows", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} {getattr(self, name)} is too small: give at least {least}")
        if not self.rate > 0 or not 0 <= self.asked <= 1:
            raise UsageError("--rate must lie above 0, and --asked between 0 and 1")


class _Stage:
    """What both stages have in common: texts of a step, and who is trained."""

    def __init__(self, stage: str, model: CausalModel, mechanism: Mechanism, texts: Source, options: Options) -> None:
        if any(model.windows):
            raise UsageError(
                f"layers of {model.name} see windows of their own: there is nothing that they could be taught"
            )
        self.model, self.mechanism, self.texts, self.options = model, mechanism, texts, options
        self.parameters: Mapping[str, Tensor] = {}
        data = hashlib.blake2b(texts.tokens.numpy().tobytes(), digest_size=8).hexdigest()
        self.identity = {
            "stage": stage, "model": model.fingerprint, "attention": mechanism.describe(), "data": data,
            **asdict(options),
        }  # fmt: skip
        model.model.requires_grad_(False)

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens `[1, T]`, their weights `[T]` and the rows looked at, on the model's device."""
        rng, options = random.Random(f"{self.options.seed} {step}"), self.options
        length = int(options.length * rng.choice((0.25, 0.5, 1.0, 1.0)))
        found = self.texts.draw(rng.getrandbits(40), max(64, length), rows=options.rows, asked=options.asked)
        device = self.model.device
        return found.tokens.unsqueeze(0).to(device), found.weights.to(device), found.rows.to(device)

    @property
    def layers(self) -> int:
        return self.model.dimensions.layers


class Teach(_Stage):
    """Stage 1: see the module."""

    def __init__(self, model: CausalModel, mechanism: Mechanism, texts: Source, options: Options) -> None:
        """Take a model, what it is taught and from what (UsageError: nothing of this mechanism is taught)."""
        super().__init__("teach", model, mechanism, texts, options)
        sizes = model.dimensions
        self.routing: list[Routing] | None = None
        self.gates: Tensor | None = None
        if mechanism.name == "superlinear":
            least = cast("Superlinear", mechanism).whole_window
            if least >= options.length // 2:
                raise UsageError(
                    f"a window of {least} leaves little to search in texts of {options.length} tokens: give more "
                    "--length, or a smaller window, as in --attention superlinear:window=512"
                )
            width, source = sizes.query_heads * sizes.head_dim, torch.Generator().manual_seed(options.seed)
            made = routes.begin(sizes.layers, width, options.rank, source)
            self.routing = [Routing(*(_leaf(x, model) for x in (r.down, r.up))) for r in made]
            self.parameters = {
                f"{layer}.{which}": getattr(r, which)
                for layer, r in enumerate(self.routing)
                for which in ("down", "up")
            }
        elif mechanism.name == "infini":
            if (segment := cast("Infini", mechanism).segment) * 2 > options.length:
                raise UsageError(
                    f"texts of {options.length} tokens are hardly longer than a segment of {segment}: give more "
                    "--length, or a smaller segment, as in --attention infini:segment=512"
                )
            # A memory of an ordinary checkpoint says little at first: begin nearly closed.
            self.gates = _leaf(torch.full((sizes.layers, sizes.query_heads), -3.0), model)
            self.parameters = {"gates": self.gates}
        else:
            raise UsageError(
                f"{mechanism.name} has nothing of its own to be taught: use {' or '.join(TAUGHT)}, or --lora 16 with "
                "--hours for the model's own layers alone"
            )

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """See `loop.Task`."""
        ids, _, rows = self.draw(step)
        last, rotary = self.layers - 1, self.model.rotary
        reader: Distilling | Gating
        if self.routing is not None:
            reader = Distilling(self.routing, cast("Superlinear", self.mechanism), rows, rotary, last)
        else:
            assert self.gates is not None
            reader = Gating(self.gates, cast("Infini", self.mechanism), rotary, last)
        try:
            with torch.no_grad():
                states(self.model, ids, reader)
        except Enough:
            pass
        if not reader.watched.losses:  # too short a text for any anchor, or for a second segment
            return sum(p.sum() for p in self.parameters.values()) * 0.0, {}, ids.numel()  # type: ignore[return-value]
        loss, shares = reader.watched.mean(self.layers)
        return loss, shares, ids.numel()

    def adapter(self) -> Adapter:
        """Return what was learnt so far."""
        routing = self.routing and tuple(Routing(r.down.detach(), r.up.detach()) for r in self.routing)
        gates = None if self.gates is None else self.gates.detach()
        about = json.loads(json.dumps(self.identity))
        made = Adapter(self.identity["model"], self.mechanism.describe(), routing or None, gates, about=about)
        return made.over(self.model.adapter)


class Adapt(_Stage):
    """Stage 2: see the module."""

    def __init__(
        self, model: CausalModel, mechanism: Mechanism, texts: Source, options: Options, taught: Adapter | None
    ) -> None:
        """Take a model, the mechanism that is on, texts, and what stage 1 taught (None: it had nothing to)."""
        super().__init__("adapt", model, mechanism, texts, options)
        self.taught = None if taught is None else taught.to(model.device)
        self.lora = Lora(model.model, options.lora, options.seed)
        self.parameters = dict(self.lora.parameters)
        self.gates = None if self.taught is None or self.taught.gates is None else _leaf(self.taught.gates, model)
        if self.gates is not None:
            self.parameters = {**self.parameters, "gates": self.gates}

    def loss(self, step: int, done: float) -> tuple[Tensor, dict[str, float], int]:
        """See `loop.Task`."""
        ids, weights, _ = self.draw(step)
        routing = None if self.taught is None else self.taught.routing
        reader = Learning(self.mechanism, self.model.rotary, routing, self.gates)
        found = states(self.model, ids, reader, again=self.model.device.type == "cuda")
        losses = token_losses(self.model.model, found, ids)[0]
        return (losses * weights[1:]).sum() / weights[1:].sum(), {}, ids.numel()

    def adapter(self) -> Adapter:
        """Return what was learnt so far, stage 1's included."""
        routing = None if self.taught is None else self.taught.routing
        gates = None if self.gates is None else self.gates.detach()
        about = json.loads(json.dumps(self.identity))
        made = Adapter(
            self.identity["model"], self.mechanism.describe(), routing, gates, self.lora.pairs(), about=about
        )
        return made.over(self.model.adapter).to(torch.device("cpu"))


def convert(
    model: CausalModel,
    mechanism: Mechanism,
    text: str | Source,
    out: Path,
    seconds: float,
    options: Options,
    *,
    tell: loop.Tell = lambda _: None,
) -> Adapter:
    """Teach a model a mechanism; write the adapter, its curves and what is needed to go on to a folder.

    Args:
        model: is frozen, and changed in memory where there is a stage 2.
        mechanism: what it is taught.
        text: to learn from, or where examples come from.
        out: the folder; a run that was stopped goes on from it.
        seconds: of training in all; a third goes to stage 1 where there are two.
        options: how.
        tell: gets lines of progress.

    Raises:
        UsageError: texts too short, or options that don't go together.
        Cancelled: Ctrl-C; the folder holds the adapter as far as it was trained.
        SaveError: the folder can't be written.
    """
    from longspan.train.curves import draw

    texts: Source = Texts(model, text) if isinstance(text, str) else text
    if texts.tokens.numel() < options.length:
        raise UsageError(f"the text has {texts.tokens.numel()} tokens: give more with --data, or less --length")
    taught: Adapter | None = None
    stages: list[tuple[str, _Stage]] = []
    if mechanism.name in TAUGHT:
        stages.append(("teach", first := Teach(model, mechanism, texts, options)))
        share = seconds / 3 if options.lora else seconds
        rates = Rates(rest=options.rate if first.gates is None else 0.05)
        taught = _run(first, out, "teach", loop.Budget(share), rates, tell)
        if not options.lora:
            draw(out / "teach" / loop.LOG, out / "curves.png")
            return taught
        seconds -= share
    if not options.lora:
        Teach(model, mechanism, texts, options)  # says what to do
    second = Adapt(model, mechanism, texts, options, taught)
    adapted = _run(second, out, "adapt", loop.Budget(seconds), Rates(rest=options.rate / 10), tell)
    draw(out / "adapt" / loop.LOG, out / "curves.png")
    return adapted


def _run(task: Teach | Adapt, out: Path, stage: str, budget: loop.Budget, rates: Rates, tell: loop.Tell) -> Adapter:
    """Run a stage; the adapter is written whichever way it ends, but for an error."""
    from longspan.errors import Cancelled

    try:
        loop.train(task, out / stage, budget, rates, muon=False, tell=tell)
    except Cancelled:
        task.adapter().save(out)
        raise
    adapter = task.adapter()
    adapter.save(out)
    return adapter


def _leaf(tensor: Tensor, model: CausalModel) -> Tensor:
    return tensor.detach().float().to(model.device).requires_grad_()
