"""What happens in a layer's attention while something is trained: teachers that are watched, mechanisms that learn.

Each is a `hf.attention.Reader` for one forward call of one text. They do not know models, data or losses' use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.attention import Hints, Mechanism
from longspan.attention.infini import Infini
from longspan.attention.superlinear import Superlinear
from longspan.hf.attention import Enough
from longspan.hf.routing import Routing
from longspan.kv.base import TensorKV
from longspan.kv.rotary import Rotary
from longspan.train import distil


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, rotary: Rotary | None, at: Tensor | None = None) -> Tensor:
    """Return causal attention from all positions of a text, `[B, Hq, T, Dv]`, with gradients.

    Args:
        q: unrotated `[B, Hq, T, D]`.
        k: unrotated `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        scale: what scores are multiplied by.
        rotary: how positions are given; None: there are none.
        at: int64 `[T]`, positions; None: 0 and up.
    """
    if rotary is not None:
        q, k = (rotary.range(x, 0) if at is None else rotary(x, at) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@dataclass
class Watched:
    """What was seen of all layers of a call."""

    losses: list[Tensor] = field(default_factory=list)
    found: list[float] = field(default_factory=list)
    """The share of far mass, or of the output, that the mechanism finds, a layer each."""
    before: list[float] = field(default_factory=list)
    """The same without training: by the query itself."""

    def mean(self, layers: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, and the shares, as means over layers."""
        loss = torch.stack(self.losses).sum() / layers
        shares = {"found": self.found, "by_query": self.before}
        return loss, {name: sum(each) / len(each) for name, each in shares.items() if each}


class Distilling:
    """Attends densely without gradients, and compares where routing queries search with where the layer looked."""

    def __init__(
        self, routing: Sequence[Routing], mechanism: Superlinear, rows: Tensor, rotary: Rotary | None, last: int
    ) -> None:
        """Take what is taught, whose anchors, which rows are compared, and the last layer that attends."""
        self.routing, self.mechanism, self.rows, self.rotary, self.last = routing, mechanism, rows, rotary, last
        self.watched = Watched()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        q, k = q.detach(), k.detach()
        looked = distil.look(q, k, self.rows, self.mechanism, scale, self.rotary)
        if looked is not None:
            with torch.enable_grad():
                asked = q[:, :, looked.rows].float()
                scores = distil.search_scores(self.routing[layer](asked), k, looked)
                self.watched.losses.append(distil.divergence(looked, scores, scale))
            with torch.no_grad():
                far = looked.cells.sum().clamp(min=1e-9)
                for searched, shares in (
                    (scores, self.watched.found),
                    (distil.search_scores(asked, k, looked), self.watched.before),
                ):
                    shares.append(float(looked.covered(self.mechanism, searched.detach()).sum() / far))
        if layer == self.last:
            raise Enough
        return dense(q, k, v, scale, self.rotary)


class Gating:
    """Attends densely without gradients, and compares what infini-attention's gates make of the same layer."""

    def __init__(self, gates: Tensor, mechanism: Infini, rotary: Rotary | None, last: int) -> None:
        """Take gates `[layers, Hq]`, the mechanism, how positions are given, and the last layer that attends."""
        self.gates, self.mechanism, self.rotary, self.last = gates, mechanism, rotary, last
        self.watched = Watched()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        out = dense(q, k, v, scale, self.rotary)
        if q.shape[2] <= self.mechanism.segment:
            raise Enough  # one segment: there is no memory yet
        with torch.enable_grad():
            kv = TensorKV(k, v, self.rotary)
            own = self.mechanism.attend(q, kv, scale=scale, hints=Hints(layer=layer, gates=self.gates[layer]))
            later = slice(self.mechanism.segment, None)
            wanted = out[:, :, later].float()
            apart = (own[:, :, later].float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-12)
        self.watched.losses.append(apart)
        self.watched.found.append(1.0 - float(apart.detach()))
        if layer == self.last:
            raise Enough
        return out


class Learning:
    """Attends by a mechanism, with gradients."""

    def __init__(
        self,
        mechanism: Mechanism,
        rotary: Rotary | None,
        routing: Sequence[Routing] | None = None,
        gates: Tensor | None = None,
    ) -> None:
        """Take the mechanism, how positions are given, and what the mechanism was taught."""
        self.mechanism, self.rotary, self.routing, self.gates = mechanism, rotary, routing, gates

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        hints = Hints(
            layer=layer,
            routing_query=None if self.routing is None else self.routing[layer](q),
            gates=None if self.gates is None else self.gates[layer],
        )
        if self.mechanism.reads_all and self.mechanism.exact:
            return dense(q, k, v, scale, self.rotary)
        return self.mechanism.attend(q, TensorKV(k, v, self.rotary), scale=scale, hints=hints)


class Placed:
    """Attends densely, with gradients, to tokens that stand at any ascending positions."""

    def __init__(self, positions: Tensor, rotary: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take int64 `[T]` and how positions are given."""
        self.positions, self.rotary = positions, rotary

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        q, k = self.rotary(q, self.positions), self.rotary(k, self.positions)
        return dense(q, k, v, scale, None)
