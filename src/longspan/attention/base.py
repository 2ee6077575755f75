"""What a mechanism is: the contract that every file of this folder fulfils.

The base does the plumbing (checks, scale, tiles of queries, types); a mechanism says what one tile of queries reads.
Capabilities are attributes, and the planner, the evals, the docs and the command line read them from the registry.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from longspan.errors import UsageError
from longspan.kernels.held import Held
from longspan.kernels.superlinear.search import Turn
from longspan.kv.base import PAGE, LayerKV

if TYPE_CHECKING:
    from longspan.attention.sharded import Parts
    from longspan.distributed.group import Group
    from longspan.distributed.shards import ShardRows


@dataclass(frozen=True)
class Shape:
    """One attention layer: heads, head sizes and the bytes that one number of the KV cache takes."""

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kv_bytes: float = 2.0
    own_bytes: float | None = None
    """Bytes of one number in the model's own type, which summaries are kept in; None: as many."""

    @property
    def token_bytes(self) -> float:
        """Bytes of one token's key and value."""
        return self.kv_heads * (self.head_dim + self.value_dim) * self.kv_bytes

    @property
    def summary_bytes(self) -> float:
        """Bytes of one number of a summary."""
        return self.kv_bytes if self.own_bytes is None else self.own_bytes

    def read_flops(self, keys: float) -> float:
        """FLOPs of one query position (all heads) that attends to `keys` keys."""
        return 2.0 * self.query_heads * keys * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Cost:
    """What one layer takes at a context of n tokens (leading terms; softmax and projections are left out)."""

    decode_flops: float
    decode_bytes: float
    """Bytes of the KV cache that one decode step reads."""
    prefill_flops: float
    """FLOPs of the whole prefill of n tokens."""
    kept_bytes: float
    """Bytes that must be kept for the next token."""
    decode_keys: float = 0.0
    """Keys and summaries that one query head scores or reads in one decode step."""


@dataclass(frozen=True)
class Hints:
    """What a caller knows beyond queries and keys."""

    routing_query: Tensor | None = None
    """`[B, Hq, T, D]`: the query that searches, where the model has one of its own (superlinear)."""
    chosen_pages: tuple[int, ...] = ()
    """Pages of 64 tokens chosen for this question by the model's retrieval heads (retrieval, and `who=model`)."""
    layer: int = 0
    """Which layer attends, from 0, counted among those that do: some mechanisms leave the first layers dense."""
    gates: Tensor | None = None
    """`[Hq]`, before the sigmoid: how much of each head's output is memory, in a model trained with one (infini)."""


@dataclass(frozen=True)
class Mechanism(ABC):
    """A way to attend over a long context. Its dataclass fields are its options."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for tables."""
    source: ClassVar[str]
    """The paper."""
    exact: ClassVar[bool] = False
    """Whether it computes dense attention itself."""
    bounded_memory: ClassVar[bool] = False
    """Whether what it keeps stops growing with the context."""
    needs_training: ClassVar[bool] = False
    """Whether the model must have been trained for it."""
    decode_order: ClassVar[str]
    """How a decode step's work grows with the context n."""
    beyond_window: ClassVar[bool] = True
    """Whether positions stay within what the model was trained on, however long the context."""
    adapts: ClassVar[bool] = False
    """Whether it still reads pages of which only summaries are held, so that a byte budget can demote cold ones."""
    evicts: ClassVar[bool] = False
    """Whether each KV head forgets keys of its own choice for good, so that its layers are `kv.kept.KeptKV`."""
    reads_all: ClassVar[bool] = False
    """Whether a decode step attends to everything that is held, in one softmax."""
    prefills: ClassVar[bool] = True
    """Whether documents are read by it; False: its paper chooses in decode only, and prefill is another mechanism's."""
    prefill_only: ClassVar[bool] = False
    """Whether it makes prefill cheaper and decodes as dense does; its blocks of queries must not be split."""
    sharded: ClassVar[bool] = False
    """Whether `attend_shard` serves, so that keys and values may lie on several ranks."""
    shard_unit: ClassVar[int] = PAGE
    """Tokens that must lie on one rank together."""
    routes: ClassVar[bool] = False
    """Whether it searches by `Hints.routing_query` where there is one."""
    block: ClassVar[int] = PAGE
    """Tokens that it chooses together (for `prefill_only`: that a chunk must be a multiple of)."""
    tile: ClassVar[int] = 256
    """Queries that are read together on a CPU."""
    gpu_tile: ClassVar[int] = 2048
    """The same on a GPU, where launches cost more than memory."""

    def reads_all_of(self, n: int) -> bool:
        """Whether a decode step after `n - 1` tokens attends to all `n` at their own positions, in one softmax.

        A window does as long as it holds them.
        """
        return self.reads_all

    def attend(self, q: Tensor, kv: LayerKV, *, scale: float | None = None, hints: Hints | None = None) -> Tensor:
        """Attend causally from the last T positions of the context.

        Args:
            q: unrotated queries `[B, Hq, T, D]` of the positions `N - T .. N - 1`; any float type.
            kv: the layer's keys and values, those of the T new tokens included.
            scale: what scores are multiplied by; None: `1/sqrt(D)`.
            hints: see `Hints`.

        Returns:
            `[B, Hq, T, Dv]` in q's type; computed in float32 (float64 where q is).
        """
        queries = q.shape[2]
        first = kv.length - queries
        hints = hints or Hints()
        scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
        computed = q.to(_compute_dtype(q.dtype))
        if queries == 1:
            return self.attend_tile(computed, kv, first, scale, hints).to(q.dtype)
        tile = self.gpu_tile if q.is_cuda else self.tile
        tiles = []
        # A tile never crosses the trained length: on its two sides positions may be read differently.
        trained = None if kv.rotary is None else kv.rotary.trained_length
        edges = {*range(0, queries, tile), queries}
        if trained is not None and first < trained < kv.length:
            edges.add(trained - first)
        for start, stop in itertools.pairwise(sorted(edges)):
            routing = hints.routing_query
            part = dataclasses.replace(hints, routing_query=None if routing is None else routing[:, :, start:stop])
            tiles.append(self.attend_tile(computed[:, :, start:stop], kv, first + start, scale, part))
        out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, 2)
        return out.to(q.dtype)

    @property
    def steps(self) -> bool:
        """Whether `step` serves."""
        return False

    def step(
        self, q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, searched: Held, turn: Turn | None
    ) -> Tensor:
        """Attend from the newest token of every sequence, in shapes that do not depend on how many tokens there are.

        Nothing is asked of the device, so that a step can be captured in a CUDA graph (where kernels serve).

        Args:
            q: unrotated queries `[B, Hq, D]`.
            k: keys, rotated to their positions where there is a `turn`; there is room for more than are there.
            v: values.
            lengths: int64 `[B]`, tokens of each sequence, the newest included.
            scale: what scores are multiplied by.
            searched: unrotated keys.
            turn: how queries are rotated; None: positions are not encoded.

        Returns:
            `[B, Hq, Dv]` in q's type.
        """
        raise NotImplementedError(f"{self.name} has no steps of one shape")

    @abstractmethod
    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """Attend from the positions `first .. first + T - 1`, T at most a tile; returns `[B, Hq, T, Dv]`."""

    def attend_shard(self, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints) -> Parts:
        """Attend to one rank's rows from the positions `first .. first + T - 1`, T at most a tile.

        Every rank calls it with the same queries; outputs are merged over ranks afterwards (`sharded.attend`).
        """
        raise NotImplementedError(f"{self.name} does not attend over several ranks")

    @abstractmethod
    def cost(self, n: int, shape: Shape) -> Cost:
        """Return what one layer takes at a context of n tokens."""

    def dropped(self, length: int) -> tuple[int, int]:
        """Return the tokens `start .. stop - 1` that no later query reads at a context of `length`."""
        return (0, 0)

    def memory(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Return the tensors, by name, in which it remembers tokens that it reads no more; {}: it keeps none.

        It holds them in `kv.memory`, and updates them as it attends: then it must read every token of the context
        itself.
        """
        return {}

    @property
    def summaries(self) -> tuple[str, ...]:
        """Return which summaries of its blocks it reads (`kv.base.SUMMARIES`), so that pages keep them up to date."""
        return ()

    @property
    def wanted_pages(self) -> int:
        """Return how many pages it wants the model's retrieval heads to choose for a question; 0: none."""
        return 0

    def within(self, keys: int, n: int) -> Mechanism:
        """Return this mechanism with its options set so that a query reads about `keys` of a context's n keys.

        Raises:
            UsageError: it has no such option, or `keys` is too few for it.
        """
        raise UsageError(f"attention {self.name!r} reads no budget of keys: choose one that does")

    def describe(self) -> str:
        """Return the specification that makes this mechanism again, without options at their defaults."""
        options = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(options) if options else "")

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the options and their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least(name: str, value: float, least: float) -> None:
    """Refuse an option below its least sensible value (UsageError)."""
    if not value >= least:
        raise UsageError(f"{name}={value} is too small: it must be at least {least}")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is none of its allowed words (UsageError)."""
    if value not in allowed:
        raise UsageError(f"{name}={value} is unknown: use one of {', '.join(allowed)}")
