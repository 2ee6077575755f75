"""Random queries, keys and values that any rank can make at any position, so that none has to be sent.

Numbers are drawn in blocks of positions, each from a seed of its own: what stands at a position is the same on every
rank, in every order of positions. It does not know who holds what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.distributed.layout import Run

_BLOCK = 4096
_KINDS = ("q", "k", "v")


@dataclass(frozen=True)
class Inputs:
    """One layer of a context."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def at(self, kind: str, runs: Sequence[Run]) -> Tensor:
        """Return `q`, `k` or `v` of these positions, `[1, H, T, D]`."""
        heads = self.heads if kind == "q" else self.kv_heads
        out = torch.empty(
            1, heads, sum(stop - start for start, stop in runs), self.head_dim, dtype=self.dtype, device=self.device
        )
        row, latest, drawn = 0, -1, out
        for start, stop in runs:
            for block in range(start // _BLOCK, -(-stop // _BLOCK)):
                first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
                if block != latest:  # of pages dealt out in turn, many lie in one block
                    latest, drawn = block, self._drawn(kind, heads, block)
                out[0, :, row : row + last - first] = drawn[:, first - block * _BLOCK : last - block * _BLOCK]
                row += last - first
        return out

    def _drawn(self, kind: str, heads: int, block: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed((self.seed * 3 + _KINDS.index(kind) << 32) + block)
        return torch.randn(heads, _BLOCK, self.head_dim, generator=generator, device=self.device, dtype=self.dtype)
