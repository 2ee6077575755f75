"""What a mechanism sees of a layer's keys and values, however they are held.

Key j is the key of the j-th token of the context. Positions are a matter of reading: `keys` gives them unrotated,
`keys_at_own_positions` rotated to j. A mechanism must not ask for what was dropped (`held`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kv.rotary import Rotary

if TYPE_CHECKING:
    from longspan.kv.memory import LayerMemory

PAGE = 64
"""Tokens in a page."""

BLOCK = 16
"""The finest block that can be summarised: a page splits into four."""

SUMMARIES = ("lowest", "highest", "mean_key", "mean_value", "lowest_rotated", "highest_rotated", "mean_key_rotated")
"""What can stand for a block: bounds and mean of its keys, unrotated or rotated to their own positions, and the mean of
its values. Every block counts as many tokens as it is long: only full blocks are summarised."""


class MassMeter(Protocol):
    """Keeps how much attention pages get; what it does with it is its own affair."""

    def step(self, pages: int) -> None:
        """Begin a decode step in which `pages` pages stand before the window."""
        ...

    def add(self, level: int, nodes: Tensor, mass: Tensor) -> None:
        """Add the mass of nodes of one level (`16**level` pages each); both of one shape, a node may appear often."""
        ...

    def truncate(self, pages: int) -> None:
        """Forget what was measured of all but the first `pages` pages."""
        ...


class LayerKV(ABC):
    """Keys `[B, Hkv, N, D]` and values `[B, Hkv, N, Dv]` of one layer, in the order of the tokens."""

    rotary: Rotary | None
    """How the model encodes positions; None: it does not, or what is held is rotated already."""
    mass: MassMeter | None = None
    """Told in decode how much attention pages get, where that decides which of them stay exact."""
    memory: LayerMemory | None = None
    """What a mechanism remembers of tokens that it reads no more (`Mechanism.memory`); None: nothing is kept."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of tokens of the context, dropped ones included (N)."""

    @property
    def kv_heads(self) -> int:
        """Number of KV heads (Hkv)."""
        return self.keys(0, 0).shape[1]

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
    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, F, D]` of tokens that each KV head chose for itself.

        Args:
            index: int64 `[B, Hkv, F]`, all held.
            rotated: whether keys come rotated to their own positions.
        """

    def gather_blocks(self, blocks: Tensor, size: int, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, P * size, D]` of whole blocks that each KV head chose for itself.

        Args:
            blocks: int64 `[B, Hkv, P]`, all held; the one that the context ends in may be among them: its rows behind
                the last token mean nothing.
            size: tokens in a block.
            rotated: whether keys come rotated to their own positions.
        """
        index = (blocks.unsqueeze(-1) * size + torch.arange(size, device=blocks.device)).flatten(-2)
        return self.gather(index.clamp(max=self.length - 1), rotated=rotated)

    @abstractmethod
    def gather_values(self, index: Tensor) -> Tensor:
        """Values `[B, Hkv, *index.shape, Dv]` of the tokens in `index` (int64, any shape, all held)."""

    @abstractmethod
    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """One summary of every full block, `[B, Hkv, N // block, D]` (Dv for `mean_value`), in the keys' float type.

        Args:
            what: one of `SUMMARIES`; the rotated ones are the unrotated where positions are not encoded.
            block: tokens in a block, a multiple of `BLOCK`.

        A block that was dropped or is held in a smaller format keeps the summary that it had before, if the pool was
        made for it, or it was asked for then.
        """

    def held(self, what: str, *, whole: bool = False) -> Held | None:
        """Return the unrotated keys `k` or the values `v` as kernels read them, where they lie; None: they can't.

        `whole`: whether so many queries read them that what lies together is to be one tensor, however long it is now.
        """
        return None

    def bounds(self, block: int, *, rotated: bool) -> Tensor:
        """Greatest and least key of every full block, a channel, side by side: `[B, Hkv, N // block, 2 D]`.

        Args:
            block: tokens in a block, a multiple of `BLOCK`.
            rotated: whether they are of keys rotated to their own positions.
        """
        ending = "_rotated" if rotated else ""
        return torch.cat([self.summary(what + ending, block) for what in ("highest", "lowest")], -1)

    def columns(self, count: int, *, rotated: bool) -> Tensor:
        """Keys of the first `count` tokens channel by channel: `[B, Hkv, D, count]`.

        Args:
            count: tokens.
            rotated: whether they are rotated to their own positions.

        Keys that can't be read (`readable`) are 0.
        """
        return (self.keys_at_own_positions(0, count) if rotated else self.keys(0, count)).mT

    def readable(self) -> Tensor | None:
        """Whether each page can be read token by token, in whatever format, bool `[ceil(N / PAGE)]`; None: all can."""
        return None

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """Keys `[B, Hkv, stop - start, D]`, each rotated to its own position in the context."""
        keys = self.keys(start, stop)
        return keys if self.rotary is None else self.rotary.range(keys, start)

    def queries_at(self, q: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries `[B, Hq, T, D]` to positions `[T]` (or unchanged where positions are not encoded)."""
        return q if self.rotary is None else self.rotary(q, positions)

    def queries_from(self, q: Tensor, first: int) -> Tensor:
        """Rotate queries `[B, Hq, T, D]` to the positions `first .. first + T - 1`; all layers share the angles."""
        return q if self.rotary is None else self.rotary.range(q, first)


class TensorKV(LayerKV):
    """Keys and values that the caller already holds as two tensors."""

    def __init__(self, k: Tensor, v: Tensor, rotary: Rotary | None = None) -> None:
        """Take k `[B, Hkv, N, D]` and v `[B, Hkv, N, Dv]`; nothing is copied."""
        self._k, self._v, self.rotary = k, v, rotary
        self._summaries: dict[tuple[str, int], Tensor] = {}

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

    def held(self, what: str, *, whole: bool = False) -> Held | None:
        """See `LayerKV`."""
        rows = self._k if what == "k" else self._v
        return Held(rows if rows.stride(-1) == 1 else rows.contiguous())

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._k[:, :, index.to(self._k.device)]

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self._v[:, :, index.to(self._v.device)]

    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        keys = self.keys_at_own_positions(0, self.length) if rotated else self._k
        index = index.to(keys.device).unsqueeze(-1)
        k = keys.gather(2, index.expand(-1, -1, -1, keys.shape[-1]))
        return k, self._v.gather(2, index.expand(-1, -1, -1, self._v.shape[-1]))

    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """See `LayerKV`; computed once a block size and kept."""
        known = self._summaries.get((what, block))
        if known is None:
            full = self.length // block
            if what == "mean_value":
                rows = self._v[:, :, : full * block]
            elif what.endswith("_rotated"):
                rows = self.keys_at_own_positions(0, full * block)
            else:
                rows = self._k[:, :, : full * block]
            known = self._summaries[what, block] = summarise(what, rows.unflatten(2, (full, block)))
        return known


def summarise(what: str, blocks: Tensor) -> Tensor:
    """Return the summary `[..., D]` of blocks `[..., block, D]` of (rotated or unrotated) keys, or of values."""
    if what.startswith("lowest"):
        return blocks.amin(-2)
    if what.startswith("highest"):
        return blocks.amax(-2)
    # Float64 sums nothing that float32 would not; half types would lose small keys in a sum of 64.
    return blocks.mean(-2, dtype=torch.promote_types(blocks.dtype, torch.float32)).to(blocks.dtype)
