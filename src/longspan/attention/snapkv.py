"""SnapKV: the keys that the end of the prompt looks at, with their neighbours.

SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469, section 4, listing 1). The last `window`
queries are the observation window. A key before it scores the attention that they give it, summed over them, and then
the highest sum among its `kernel` neighbours (max pooling over the rows), so that what stands around a key stays too.

What differs from the paper: one choice for the query heads of a KV head, by the sum of theirs; `sinks` are kept (0 is
the paper's); `every` evicts on the way as well, with the observation window there. The paper compresses a prompt whose
end is the question. Here a document is compressed before it is asked anything: the end of the document then decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Shape, at_least
from longspan.attention.evicting import Evicting, Reading
from longspan.attention.row_attention import attend_rows
from longspan.errors import UsageError
from longspan.kernels.column_mass import column_mass
from longspan.kv.rows import KeptRows, Learned


@dataclass(frozen=True)
class SnapKV(Evicting):
    """Keeps what the observation window looks at."""

    window: int = 32
    """Observation window: newest queries that score the keys before them, and whose own keys are always kept."""
    kernel: int = 7
    """Neighbouring rows that a row's score is the highest of; odd."""

    name: ClassVar[str] = "snapkv"
    about: ClassVar[str] = "the keys that the last queries look at, with their neighbours"
    source: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        at_least("window", self.window, 1)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel={self.kernel} has no middle: it must be odd, such as {max(1, self.kernel) | 1}")

    def learn(self, known: Learned, reading: Reading) -> Learned:
        """See `Evicting.learn`: the newest queries, `queries` `[Hq, up to window, D]`, unrotated and scaled."""
        newest = reading.q[0, :, -self.window :] * reading.scale
        before = known.whole.get("queries")
        if before is not None and newest.shape[1] < self.window:
            newest = torch.cat([before, newest], 1)[:, -self.window :]
        return replace(known, whole={"queries": newest.clone()})

    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """See `Evicting.scores`."""
        queries = rows.learned.whole.get("queries")
        kv_heads, held = rows.pages.pool.kv_heads, rows.held
        if queries is None:
            return torch.zeros(kv_heads, held, device=rows.pages.pool.device)
        seen = rows.learned.length - rows.evicted
        # The observation window's own rows are always kept.
        before = seen - queries.shape[1]
        q, k = queries.unsqueeze(0), rows.keys_as_read(seen, own).to(queries.dtype)
        if rows.rotary is not None:
            q = rows.rotary.range(q, before + (rows.evicted if own else 0))
        lse = attend_rows(q, k, k, 1.0)[1]
        mass = column_mass(q, k, lse, scale=1.0)[:, :, :before]
        if before:
            mass = torch.nn.functional.max_pool1d(mass, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.nn.functional.pad(mass[0], (0, held - before))

    def learned_bytes(self, keys: int, shape: Shape) -> float:
        """See `Evicting.learned_bytes`; what was learned is forgotten with the one eviction at the end."""
        return 4.0 * shape.query_heads * min(self.window, keys) * shape.head_dim if self.every else 0.0
