"""What a checkpoint was trained with beyond its architecture, as its configuration says: an attention and its gates.

The entry `longspan` of config.json names the mechanism that the model was trained with and, where that mixes a memory
in by gates, one number for each layer and query head: so few that they need no file of their own. transformers keeps
entries that it does not know, so `save_pretrained` writes it. It does not know what mechanisms do with gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.attention.base import Mechanism
from longspan.errors import ModelError
from longspan.hf.adapter import Adapter
from longspan.hf.routing import Routing

_ENTRY = "longspan"


@dataclass(frozen=True, eq=False)
class Trained:
    """The mechanism that a model was trained with; an ordinary checkpoint has none."""

    attention: str | None = None
    """Its name; None: dense attention, as everybody's."""
    gates: Tensor | None = None
    """float32 `[layers, Hq]`, before the sigmoid; None: it has none."""

    routing: tuple[Routing, ...] | None = None
    """What searches in each layer where an adapter says so; None: the query itself."""

    def layer(self, number: int) -> Tensor | None:
        """Return the gates `[Hq]` of a layer."""
        return None if self.gates is None else self.gates[number]

    def route(self, number: int, q: Tensor) -> Tensor | None:
        """Return the routing queries of a layer's queries `[B, Hq, T, D]`; None: they are these."""
        return None if self.routing is None else self.routing[number](q)

    def adapted(self, adapter: Adapter, name: str, layers: int, query_heads: int, head_dim: int) -> Trained:
        """Return what the model was trained with once an adapter is loaded (ModelError: one of another shape)."""
        width, routing, gates = query_heads * head_dim, adapter.routing, adapter.gates
        fits = routing is None or (
            len(routing) == layers and all(r.down.shape[1] == r.up.shape[0] == width for r in routing)
        )
        if not fits or (gates is not None and gates.shape != (layers, query_heads)):
            raise ModelError(f"the adapter {name} is of a model with other layers or heads: name its own")
        mechanism = None if adapter.attention is None else adapter.attention.partition(":")[0]
        return Trained(mechanism or self.attention, self.gates if gates is None else gates, routing)

    def lacks(self, mechanism: Mechanism | None, model: str) -> list[str]:
        """Return a line that says so where a mechanism must be trained into a model, and it was not; else none."""
        if mechanism is None or not mechanism.needs_training or self.attention == mechanism.name:
            return []
        return [f"{mechanism.name} needs a model that was trained with it, which {model} was not: expect nonsense"]


def read(name: str, config: Any, layers: int, query_heads: int) -> Trained:
    """Return what a model's configuration says (ModelError: it can't be that)."""
    entry = getattr(config, _ENTRY, None)
    if entry is None:
        return Trained()
    attention = entry.get("attention") if isinstance(entry, dict) else None
    if not isinstance(attention, str):
        raise ModelError(f"the entry {_ENTRY!r} of {name}'s config.json names no attention: remove it, or train again")
    if (rows := entry.get("gates")) is None:
        return Trained(attention)
    whole = isinstance(rows, list) and len(rows) == layers
    if not whole or not all(_is_row(row, query_heads) for row in rows):
        raise ModelError(f"the gates in {name}'s config.json are not {layers} layers of {query_heads} numbers")
    return Trained(attention, torch.tensor(rows, dtype=torch.float32))


def record(config: Any, attention: str, gates: Tensor | Sequence[Sequence[float]] | None = None) -> None:
    """Write into a model's configuration what it was trained with, for `save_pretrained`.

    Args:
        config: of the model (`model.config`).
        attention: the mechanism's name.
        gates: `[layers, Hq]`, before the sigmoid; None: it has none.
    """
    entry: dict[str, Any] = {"attention": attention}
    if gates is not None:
        entry["gates"] = torch.as_tensor(gates).detach().float().tolist()
    setattr(config, _ENTRY, entry)


def _is_row(row: Any, count: int) -> bool:
    return (
        isinstance(row, list)
        and len(row) == count
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in row)
    )
