"""KeyDiff: the keys that differ most from the others; attention is not asked.

KeyDiff: Key Similarity-Based KV Cache Eviction (arXiv 2504.15364, section 3.2): with the mean of the keys' directions,
`m = mean of k_j / |k_j|`, a key scores `-cos(m, k_j)`; the least similar stay. Keys are compared as they are read,
rotated, as in the paper. Evictions come every `every` tokens, the paper's block-wise prompt processing.

What differs from the paper: `sinks` and a `window` of newest keys are kept (both 0 is the paper's plain version).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.evicting import Evicting
from longspan.kv.rows import KeptRows


@dataclass(frozen=True)
class KeyDiff(Evicting):
    """Keeps the keys least like the mean key."""

    every: int = 512
    """Tokens of a document between two evictions; 0: only after all of it, or where there is no room for more."""

    name: ClassVar[str] = "keydiff"
    about: ClassVar[str] = "the keys whose direction differs most from the others'"
    source: ClassVar[str] = "arXiv 2504.15364"

    def scores(self, rows: KeptRows, own: bool) -> Tensor:
        """See `Evicting.scores`."""
        keys = rows.keys_as_read(rows.held, own)[0]
        keys = keys if keys.dtype == torch.float64 else keys.float()
        directions = torch.nn.functional.normalize(keys, dim=-1)
        return -torch.cosine_similarity(keys, directions.mean(1, keepdim=True), dim=-1)
