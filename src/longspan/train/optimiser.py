"""How weights move: Muon for matrices, AdamW for the rest, one learning rate over time for both.

Muon is an orthogonalised momentum step for matrices; embeddings, heads, norms and what has one axis move by AdamW. The
rate rises over some steps, stays, and falls over the last part of the TIME given, not of a number of steps: whoever has
an hour says so. It does not know models or losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rates:
    """Learning rates and how they change."""

    matrices: float = 0.02
    """Of Muon."""
    rest: float = 3e-3
    """Of AdamW."""
    warmup: int = 30
    """Steps over which rates rise."""
    fall: float = 0.4
    """Share of the time, its last, over which they fall to a twentieth."""

    def at(self, step: int, done: float) -> float:
        """Return what rates are multiplied by, at a step (from 0) with a share of the time done."""
        return min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.05, (1 - done) / self.fall))


class Optimiser:
    """Muon and AdamW side by side."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], rates: Rates, *, muon: bool = True) -> None:
        """Take the parameters that move, by name; `muon=False`: AdamW for all, at the rate of the rest."""
        self.rates = rates
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in named:
            inner = muon and parameter.dim() == 2 and not any(part in name for part in ("embed", "lm_head"))
            (matrices if inner else rest).append(parameter)
        self._each: list[tuple[Any, float]] = []
        if rest:
            adam = torch.optim.AdamW(rest, lr=rates.rest, betas=(0.9, 0.98), weight_decay=0.0)
            self._each.append((adam, rates.rest))
        if matrices:
            moved = torch.optim.Muon(matrices, lr=rates.matrices, momentum=0.95, weight_decay=0.0)
            self._each.append((moved, rates.matrices))
        self._all = [*matrices, *rest]

    def step(self, step: int, done: float) -> float:
        """Move by the gradients, clipped to a norm of 1, and forget them; returns that norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self._all, 1.0))
        for one, rate in self._each:
            for group in one.param_groups:
                group["lr"] = rate * self.rates.at(step, done)
            one.step()
            one.zero_grad(set_to_none=True)
        return norm

    def state(self) -> list[dict[str, Any]]:
        """Return everything that the next step depends on beside the parameters."""
        return [one.state_dict() for one, _ in self._each]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Go on from a `state`."""
        for (one, _), kept in zip(self._each, state, strict=True):
            one.load_state_dict(kept)
