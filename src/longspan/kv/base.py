"""What a mechanism sees of a layer's keys and values, however they are held.

Key j is the key of the j-th token of the context. Positions are a matter of reading: `keys` gives them unrotated,
`keys_at_own_positions` rotated to j. A mechanism must not ask for what was dropped (`held`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from longspan.kv.rotary import Rotary

PAGE = 64
"""Tokens in a page."""


class LayerKV(ABC):
    """Keys `[B, Hkv, N, D]` and values `[B, Hkv, N, Dv]` of one layer, in the order of the tokens."""

    rotary: Rotary | None
    """How the model encodes positions; None: it does not, or what is held is rotated already."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of tokens of the context, dropped ones included (N)."""

    @abstractmethod
    def keys(self, start: int, stop: int) -> Tensor:
        """Unrotated keys `[B, Hkv, stop - start, D]` of the tokens `start .. stop - 1`; a view where it can be."""

    @abstractmethod
    def values(self, start: int, stop: int) -> Tensor:
        """Values `[B, Hkv, stop - start, Dv]` of the tokens `start .. stop - 1`; a view where it can be."""

    @abstractmethod
    def gather_keys(self, index: Tensor) -> Tensor:
        """Unrotated keys `[B, Hkv, *index.shape, D]` of the tokens in `index` (int64, any shape, all held)."""

    @abstractmethod
    def gather_values(self, index: Tensor) -> Tensor:
        """Values `[B, Hkv, *index.shape, Dv]` of the tokens in `index` (int64, any shape, all held)."""

    @abstractmethod
    def page_bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest unrotated key a channel of every full page: two `[B, Hkv, N // PAGE, D]`."""

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """Keys `[B, Hkv, stop - start, D]`, each rotated to its own position in the context."""
        keys = self.keys(start, stop)
        return keys if self.rotary is None else self.rotary.range(keys, start)

    def queries_at(self, q: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries `[B, Hq, T, D]` to positions `[T]` (or unchanged where positions are not encoded)."""
        return q if self.rotary is None else self.rotary(q, positions)


class TensorKV(LayerKV):
    """Keys and values that the caller already holds as two tensors."""

    def __init__(self, k: Tensor, v: Tensor, rotary: Rotary | None = None) -> None:
        """Take k `[B, Hkv, N, D]` and v `[B, Hkv, N, Dv]`; nothing is copied."""
        self._k, self._v, self.rotary = k, v, rotary

    @property
    def length(self) -> int:
        """See `LayerKV`."""
        return self._k.shape[2]

    def keys(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._k[:, :, start:stop]

    def values(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self._v[:, :, start:stop]

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._k[:, :, index.to(self._k.device)]

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._v[:, :, index.to(self._v.device)]

    def page_bounds(self) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        full = self.length // PAGE
        pages = self._k[:, :, : full * PAGE].unflatten(2, (full, PAGE))
        if full == 0:
            empty = pages.new_empty(*pages.shape[:3], pages.shape[-1])
            return empty, empty
        return torch.amin(pages, 3), torch.amax(pages, 3)
