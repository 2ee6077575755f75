"""Quest: pages of 16 keys, the best by an upper bound of their scores.

Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (arXiv 2406.10774, section 3.3 and algorithm 1).
For a page with the least and greatest key a channel, `min_d` and `max_d`, no key of it can score above
`sum_d max(q_d min_d, q_d max_d)`. Pages with the greatest bounds are read exactly; layers 0 and 1 are dense. What
differs from the paper: a page is chosen for a KV head (or layer, or model), not for a query head, and a window and
sinks are always read (see `choosing.py`). The paper chooses in decode only; where this file is given more queries, each
of them chooses for itself.

Bounds are of rotated keys up to the length that the model was trained on, as in the paper. Beyond it they are of
unrotated keys and queries: where a page will be read is only known once it is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.choosing import Choosing
from longspan.attention.indexed import reads_own_positions
from longspan.kv.base import BLOCK, LayerKV

_PIECE = 2048
"""Blocks of a KV head whose bounds are scored together: a MiB in float32, with heads of 64 channels."""


@dataclass(frozen=True)
class Quest(Choosing):
    """Reads the pages of 16 whose keys could score highest."""

    name: ClassVar[str] = "quest"
    about: ClassVar[str] = "the pages of 16 keys whose bounds promise the highest scores"
    source: ClassVar[str] = "arXiv 2406.10774"
    decode_order: ClassVar[str] = "n/16"
    block: ClassVar[int] = BLOCK
    scored: ClassVar[int] = 2
    prefills: ClassVar[bool] = False

    @property
    def summaries(self) -> tuple[str, ...]:
        """See `Mechanism.summaries`."""
        return ("lowest", "highest", "lowest_rotated", "highest_rotated") if self.who != "model" else ()

    def scores(self, q: Tensor, kv: LayerKV, first: int, blocks: int, scale: float) -> Tensor:
        """See `Choosing.scores`."""
        batch, heads, count, dim = q.shape
        rotated = kv.rotary is not None and reads_own_positions(kv, first + count)
        if kv.rotary is not None and rotated:
            q = kv.rotary.range(q, first)
        extremes = kv.bounds(self.block, rotated=rotated)[:, :, :blocks]
        # A positive channel of the query meets the greatest key, a negative one the least.
        grouped = q.reshape(batch * extremes.shape[1], -1, dim) * scale
        signed = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], -1)
        # Widened piece by piece: as a whole it would go to memory and come back from there.
        pieces = extremes.flatten(0, 1).split(_PIECE, 1)
        scores = [torch.bmm(signed, piece.to(q.dtype).mT) for piece in pieces]
        return torch.cat(scores, -1).view(batch, heads, count, blocks)
