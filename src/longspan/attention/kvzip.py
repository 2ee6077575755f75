"""KVzip: the keys without which the model could not repeat the context.

KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (arXiv 2505.23416, section 3). What will be asked
is not known when keys are evicted; but who can repeat a context can answer anything about it. So the context is read
once more, behind itself and after an instruction to repeat it, piece by piece. A key scores the most attention that any
query of the repetition gives it, over the query heads of its KV head; nothing else of the repetition stays.

What differs from the paper: a piece's queries score every key, not only those of the piece that they repeat; weights
are shares of all that a query sees; a `window` of newest keys is kept beside the `sinks`. Heads of all layers share one
budget, and none is sure of a part of it, as in the paper; `heads=adaptive` lets those of a layer share theirs, with
`heads=same` they keep equally many. Pieces are as long as a chunk. Reading takes more than twice as long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Shape
from longspan.attention.evicting import Evicting, Reading
from longspan.errors import UsageError
from longspan.kernels.column_mass import column_most
from longspan.kv.rows import KeptRows, Learned


@dataclass(frozen=True)
class KVzip(Evicting):
    """Keeps what repeating the context needs."""

    heads: str = "model"
    safeguard: float = 0.0

    name: ClassVar[str] = "kvzip"
    about: ClassVar[str] = "the keys that the model looks at when it repeats the context"
    source: ClassVar[str] = "arXiv 2505.23416"
    repeats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that there is no repetition for."""
        super().__post_init__()
        if self.every or self.per_question:
            raise UsageError("kvzip evicts once a document was read and repeated: leave out every and when")

    def learn(self, known: Learned, reading: Reading) -> Learned:
        """See `Evicting.learn`: the most attention that a repetition gave each row, `most` bfloat16 `[Hkv, N]`."""
        if not reading.repeated:
            return known
        most = column_most(reading.turned, reading.keys, reading.lse, scale=reading.scale)[0, :, : reading.repeated]
        before = known.rows.get("most")
        if before is not None:
            most[:, : before.shape[1]].clamp_(min=before)
        return replace(known, rows={"most": most.to(torch.bfloat16)})

    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """See `Evicting.scores`; what was not repeated, for want of positions, is newer than what was, and stays."""
        most = rows.learned.rows.get("most")
        if most is None:
            return torch.zeros(rows.pages.pool.kv_heads, rows.held, device=rows.pages.pool.device)
        return torch.nn.functional.pad(most.float(), (0, rows.held - most.shape[1]), value=torch.inf)

    def learned_bytes(self, keys: int, shape: Shape) -> float:
        """See `Evicting.learned_bytes`."""
        return 2.0 * shape.kv_heads * keys

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`: every token is read twice, the second time with all before it, and scored."""
        cost = super().cost(n, shape)
        again = n * shape.read_flops(n) * (1 + shape.head_dim / (shape.head_dim + shape.value_dim))
        return replace(cost, prefill_flops=cost.prefill_flops + again)
