"""Routing queries: what searches, where that is not the query that reads; low-rank functions of a layer's own queries.

    s = q + U V q        q [Hq D], all heads of a token together, without positions; V [r, Hq D], U [Hq D, r]

A layer's queries hold as much of a token as its heads project (as wide as the residual stream in most models), and
readers have them already: a model needs no other module, and every forward and every kernel stays as it is. With U = 0
a search is by the query itself, which is where training begins. It does not know who searches, or how U and V came.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """The routing query of one layer."""

    down: Tensor
    """V `[r, Hq D]`."""
    up: Tensor
    """U `[Hq D, r]`."""

    def __call__(self, q: Tensor) -> Tensor:
        """Return the routing queries of unrotated queries `[B, Hq, T, D]`, in their type and shape."""
        flat = q.transpose(1, 2).flatten(2)
        moved: Tensor = (flat @ self.down.to(flat).mT) @ self.up.to(flat).mT
        by_head: Tensor = moved.unflatten(-1, q.shape[1::2]).transpose(1, 2)
        return q + by_head


def begin(layers: int, width: int, rank: int, generator: torch.Generator) -> list[Routing]:
    """Return routing queries that are the queries themselves, ready to be trained: V random, U zero; float32.

    Args:
        layers: how many.
        width: Hq D.
        rank: r.
        generator: draws V.
    """
    return [
        Routing(
            torch.randn(rank, width, generator=generator).mul_(width**-0.5).requires_grad_(),
            torch.zeros(width, rank).requires_grad_(),
        )
        for _ in range(layers)
    ]
