"""Expected attention: the keys that the queries to come will probably look at, weighed by their values.

Expected Attention (arXiv 2510.00636, section 3; NVIDIA's kvpress, ExpectedAttentionPress). The queries read so far,
unrotated, have mean `m` and covariance `S` a query head. With `R` the mean of the rotations to the next `future`
positions, a query to come is taken for a Gaussian of mean `R m` and covariance `R S R^T`. The mean of `exp(s q . k)` is
then `exp(s (R m) . k + s^2 / 2 k^T R S R^T k)`, s the scale of scores. A key's score is that, normalised over the keys
(a softmax), averaged over the query heads of its KV head, plus `epsilon`, times the norm of its value.

Sinks are left out of statistics and of the softmax, as in kvpress. What differs: statistics are of all queries read so
far, whenever keys are evicted; a `window` of newest keys is kept (0 in kvpress); the norm is the value's own, not that
after the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Shape, at_least
from longspan.attention.evicting import Evicting, Reading
from longspan.kv.rows import KeptRows, Learned

_SLAB = 1 << 13
"""Rows whose products with the covariance are held at once."""


@dataclass(frozen=True)
class Expected(Evicting):
    """Keeps what future queries are expected to look at."""

    future: int = 512
    """Next positions over which the rotation is averaged."""
    epsilon: float = 0.0
    """Added to the expected attention before it is multiplied by the value's norm."""

    name: ClassVar[str] = "expected"
    about: ClassVar[str] = "the keys that queries to come are expected to look at"
    source: ClassVar[str] = "arXiv 2510.00636"

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        at_least("future", self.future, 1)
        at_least("epsilon", self.epsilon, 0.0)

    def learn(self, known: Learned, reading: Reading) -> Learned:
        """See `Evicting.learn`: number, mean and sum of squared deviations of the scaled queries behind the sinks.

        `count` `[1]`, `mean` `[Hq, D]`, `spread` `[Hq, D, D]`; two stretches merge as in Chan, Golub and LeVeque,
        Updating Formulae and a Pairwise Algorithm for Computing Sample Variances (1979).
        """
        q = reading.q[0, :, max(0, self.sinks - reading.first) :] * reading.scale
        if q.shape[1] == 0:
            return known
        mean = q.mean(1)
        centred = q - mean.unsqueeze(1)
        spread, count = centred.mT @ centred, q.new_full((1,), q.shape[1])
        if known.whole:
            old, more = known.whole["count"], count
            count = old + more
            apart = mean - known.whole["mean"]
            mean = known.whole["mean"] + apart * (more / count)
            outer = apart.unsqueeze(2) * apart.unsqueeze(1)
            spread = spread + known.whole["spread"] + outer * (old * more / count)
        return replace(known, whole={"count": count, "mean": mean, "spread": spread})

    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """See `Evicting.scores`."""
        kv_heads, held = rows.pages.pool.kv_heads, rows.held
        known, first = rows.learned.whole, min(self.sinks, held)
        if not known or first == held:
            return torch.zeros(kv_heads, held, device=rows.pages.pool.device)
        mean, covariance = known["mean"], known["spread"] / known["count"]
        if rows.rotary is not None:
            start = rows.length if own else held
            ends = (start, start + self.future)
            mean = rows.rotary.averaged(mean, *ends)
            half = rows.rotary.averaged(covariance, *ends)  # S R^T
            covariance = rows.rotary.averaged(half.mT, *ends)  # R S R^T, which is its own transpose
        mean, covariance = mean.unflatten(0, (kv_heads, -1)), covariance.unflatten(0, (kv_heads, -1))
        parts = []
        for slab in rows.keys_as_read(held, own)[0, :, first:].split(_SLAB, 1):
            k = slab.unsqueeze(1).to(mean.dtype)  # [Hkv, 1, slab, D]
            parts.append((k @ mean.unsqueeze(-1)).squeeze(-1) + ((k @ covariance) * k).sum(-1) / 2)
        logits = torch.cat(parts, -1)  # [Hkv, group, N]
        values = rows.pages.values(first, held)[0].to(mean.dtype).norm(dim=-1)
        scores = (torch.softmax(logits, -1).mean(1) + self.epsilon) * values
        return torch.nn.functional.pad(scores, (first, 0))

    def learned_bytes(self, keys: int, shape: Shape) -> float:
        """See `Evicting.learned_bytes`; what was learned is forgotten with the one eviction at the end."""
        return 4.0 * shape.query_heads * shape.head_dim * (shape.head_dim + 1) if self.every else 0.0
