"""Adapters: what training adds to a checkpoint, as a small folder that is loaded beside it.

`adapter.json` says what was trained and for which weights (their fingerprint); `adapter.safetensors` holds

    routing.L.down, routing.L.up   a layer's routing query (`routing.py`), L counted among layers that attend
    gates                          `[layers, Hq]`, before the sigmoid (infini)
    lora.NAME.down, lora.NAME.up   `[r, in]` and `[out, r]` of a linear layer: its weight grows by up @ down

Changed weights are merged when the adapter is loaded: every forward, kernel and decoder then runs as for any model, and
the fingerprint is another, so that sessions are not mixed up. A number that positions are rotated by may change too.
It does not know how any of it is trained.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.errors import ModelError, SaveError
from longspan.hf.routing import Routing

FORMAT = 1
CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
_LORA, _ROUTING = "lora.", "routing."


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to a model."""

    model: str
    """Fingerprint of the model that it was trained on."""
    attention: str | None = None
    """The mechanism that it was trained with, with its options; None: any."""
    routing: tuple[Routing, ...] | None = None
    """A layer each."""
    gates: Tensor | None = None
    """float32 `[layers, Hq]`."""
    lora: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By a linear layer's name in the model: `(down, up)`."""
    window: int | None = None
    """Positions that it extends the model to; None: as many as before."""
    rope: Mapping[str, Any] | None = None
    """transformers' `rope_parameters` after extending; None: as before."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: for people."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that was trained, by the names of the file."""
        found: dict[str, Tensor] = {}
        for layer, routing in enumerate(self.routing or ()):
            found |= {f"{_ROUTING}{layer}.down": routing.down, f"{_ROUTING}{layer}.up": routing.up}
        for name, (down, up) in self.lora.items():
            found |= {f"{_LORA}{name}.down": down, f"{_LORA}{name}.up": up}
        return found if self.gates is None else {**found, "gates": self.gates}

    def to(self, device: torch.device) -> Adapter:
        """Return it with routing queries and gates on a device."""
        routing = self.routing and tuple(Routing(r.down.to(device), r.up.to(device)) for r in self.routing)
        return replace(self, routing=routing, gates=None if self.gates is None else self.gates.to(device))

    def over(self, before: Adapter | None) -> Adapter:
        """Return both as one adapter of the model that `before` was trained on; this one was trained on top of it.

        Changes of weights add up; positions are those of `before` unless this one has its own; so is what was trained.
        """
        if before is None:
            return self
        lora = dict(before.lora)
        for name, (down, up) in self.lora.items():
            older = lora.get(name, (down[:0], up[:, :0]))
            lora[name] = torch.cat([older[0].to(down), down]), torch.cat([older[1].to(up), up], 1)
        return replace(
            self, model=before.model, lora=lora, window=self.window or before.window, rope=self.rope or before.rope,
            routing=self.routing or before.routing, gates=before.gates if self.gates is None else self.gates,
            attention=self.attention or before.attention, about={**self.about, "over": dict(before.about)},
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """Write the folder; a file is there as a whole or not at all (SaveError: it can't be written)."""
        from safetensors.torch import save

        told = {k: v for k, v in asdict(_Told.of(self)).items() if v is not None}
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / WEIGHTS, save(tensors))
            write(folder / CONFIG, (json.dumps(told, indent=2) + "\n").encode())
        except OSError as error:
            raise SaveError(f"can't write the adapter to {folder}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Told:
    format: int
    model: str
    attention: str | None
    window: int | None
    rope: dict[str, Any] | None
    about: dict[str, Any]

    @classmethod
    def of(cls, adapter: Adapter) -> _Told:
        rope = None if adapter.rope is None else dict(adapter.rope)
        return cls(FORMAT, adapter.model, adapter.attention, adapter.window, rope, dict(adapter.about))


def read(folder: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in a folder (ModelError: it holds none that can be used)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder).expanduser()
    if not (place / CONFIG).is_file():
        raise ModelError(f"{folder} holds no {CONFIG}: name the folder that longspan convert or extend wrote")
    try:
        told = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(place / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter {folder} can't be read ({error}): train it again") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or not isinstance(told.get("model"), str):
        raise ModelError(f"{place / CONFIG} is of another format than {FORMAT}: train the adapter again")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, which = name.rpartition(".")
        if name != "gates":
            pairs.setdefault(owner, {})[which] = tensor
    if any(pair.keys() != {"down", "up"} for pair in pairs.values()):
        raise ModelError(f"the adapter {folder} lacks tensors: train it again")
    layers = sorted(int(name.removeprefix(_ROUTING)) for name in pairs if name.startswith(_ROUTING))
    if layers != list(range(len(layers))):
        raise ModelError(f"the adapter {folder} has routing queries of some layers only: train it again")
    routing = [Routing(**pairs[f"{_ROUTING}{layer}"]) for layer in layers]
    return Adapter(
        model=told["model"],
        attention=told.get("attention"),
        routing=tuple(routing) or None,
        gates=tensors.get("gates"),
        lora={name.removeprefix(_LORA): (p["down"], p["up"]) for name, p in pairs.items() if name.startswith(_LORA)},
        window=told.get("window"),
        rope=told.get("rope"),
        about=told.get("about", {}),
    )


@torch.no_grad()
def merge(adapter: Adapter, model: Any, name: str) -> None:
    """Change a transformers model's weights and positions as an adapter says.

    Args:
        adapter: trained on this model.
        model: its weights are written to.
        name: of the adapter, as errors name it.

    Raises:
        ModelError: it names a linear layer that the model lacks, or has otherwise.
    """
    for module_name, (down, up) in adapter.lora.items():
        try:
            weight = model.get_submodule(module_name).weight
            weight.copy_(weight.float() + up.to(weight.device).float() @ down.to(weight.device).float())
        except (AttributeError, RuntimeError) as error:
            raise ModelError(f"the adapter {name} does not fit this model at {module_name}: name its own") from error
    config = model.config.get_text_config()
    if adapter.window is not None:
        config.max_position_embeddings = adapter.window
    if adapter.rope is not None:
        rotate(model, adapter.rope)


def rotate(model: Any, rope: Mapping[str, Any]) -> None:
    """Have a transformers model rotate by other parameters (ModelError: it has no one place that rotates)."""
    config, base = model.config.get_text_config(), model.base_model
    module = getattr(base, "rotary_emb", None)
    if module is None:
        raise ModelError("this model encodes no positions by rotation: there is nothing to extend")
    config.rope_parameters = dict(rope)
    base.rotary_emb = type(module)(config=config).to(model.device)


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
