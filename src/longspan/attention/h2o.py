"""H2O: the keys that got most attention so far (heavy hitters), and the newest ones.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference (arXiv 2306.14048, section 4 and algorithm 1): a key's score
is the attention that all queries so far gave it, `sum over t of softmax(q_t K / sqrt(D))_j`; half of the budget goes to
the highest scores, half to the newest keys. The sum goes on for keys that stay; a query counts what was held then.

What differs from the paper: a KV head's query heads add up (grouped queries came later); evictions come every `every`
tokens (`every=1` is the paper's, token by token), and in an answer not at all; `sinks` are kept (0 is the paper's).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Shape
from longspan.attention.evicting import Evicting, Reading
from longspan.kernels.column_mass import column_mass
from longspan.kv.rows import KeptRows, Learned


@dataclass(frozen=True)
class H2O(Evicting):
    """Keeps heavy hitters and the newest keys."""

    window: int = 1024
    """Newest keys that are always kept: half of the budget in the paper."""
    every: int = 512
    """Tokens of a document between two evictions; 0: only after all of it, or where there is no room for more."""

    name: ClassVar[str] = "h2o"
    about: ClassVar[str] = "the keys that got most attention so far, and the newest"
    source: ClassVar[str] = "arXiv 2306.14048"

    def learn(self, known: Learned, reading: Reading) -> Learned:
        """See `Evicting.learn`: the attention mass of every row, `mass` float32 `[Hkv, N]`."""
        mass = column_mass(reading.turned, reading.keys, reading.lse, scale=reading.scale)[0]
        before = known.rows.get("mass")
        if before is not None:
            mass[:, : before.shape[1]] += before
        return replace(known, rows={"mass": mass})

    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """See `Evicting.scores`."""
        mass = rows.learned.rows.get("mass")
        if mass is None:
            return torch.zeros(rows.pages.pool.kv_heads, rows.held, device=rows.pages.pool.device)
        return torch.nn.functional.pad(mass, (0, rows.held - mass.shape[1]))

    def within(self, keys: int, n: int) -> H2O:
        """See `Mechanism.within`: half of the keys are the newest."""
        return replace(self, budget=keys, window=keys // 2, sinks=min(self.sinks, keys // 16))

    def learned_bytes(self, keys: int, shape: Shape) -> float:
        """See `Evicting.learned_bytes`."""
        return 4.0 * shape.kv_heads * keys

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`: reading multiplies queries and keys once more."""
        cost = super().cost(n, shape)
        again = shape.head_dim / (shape.head_dim + shape.value_dim)
        return replace(cost, prefill_flops=cost.prefill_flops * (1 + again))
