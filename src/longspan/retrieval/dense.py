"""Passages ranked by how alike their vectors are to a question's.

The score is the cosine of the angle between two vectors after what all passages have in common was taken out of both:
their mean, and the directions in which they differ most ("all but the top", arXiv 1702.01417). States of a language
model lie in a narrow cone, where any two are alike until that is done. It does not know where vectors come from
(`engine/embedding.py`), nor words.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOP = 1
"""Directions that are taken out beside the mean; see docs/experiments.md."""


class DenseIndex:
    """Cosines over the vectors of passages held in memory."""

    def __init__(self, vectors: Tensor) -> None:
        """Take the passages' vectors, float `[passages, D]`."""
        self._mean = vectors.mean(0) if len(vectors) else vectors.new_zeros(vectors.shape[1])
        centred = vectors - self._mean
        # Of very few passages the directions would be the passages themselves.
        top = _TOP if len(vectors) > 8 * _TOP else 0
        self._top = torch.linalg.svd(centred, full_matrices=False).Vh[:top] if top else centred[:0]
        self._vectors = self._freed(centred)

    def __len__(self) -> int:
        return len(self._vectors)

    def scores(self, query: Tensor) -> Tensor:
        """Return every passage's cosine to a query `[D]`, `[passages]`, from -1 to 1."""
        return torch.nn.functional.cosine_similarity(self._vectors, self._freed(query - self._mean).unsqueeze(0), dim=1)

    def ranking(self, query: Tensor) -> list[int]:
        """Return all passages, best first; of equal ones the earlier."""
        found: list[int] = self.scores(query).argsort(descending=True, stable=True).tolist()
        return found

    def _freed(self, centred: Tensor) -> Tensor:
        return centred - (centred @ self._top.mT) @ self._top
