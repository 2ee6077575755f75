"""Queries, keys and values to measure with: random ones, and ones that are searched as by a trained model.

Random inputs are the worst case for spans: every query head of every query chooses spans of its own. In a model
trained to search, neighbouring queries ask for the same thing and choose neighbouring spans; `trained` makes such
inputs without a model:

- the context is cut into stretches of `2 sqrt(N)` tokens, so that every stretch holds an anchor of every query; each
  stretch has a topic in each KV head, a random direction u, and its keys are `z / 2 + 8 u` (z normal, |u| = 1);
- queries come in runs of 256, about a paragraph; in each run, each query head wants three stretches that lie before
  the first query's window, and its queries are `z / 2 + 8 (u_1 + u_2 + u_3)`.

A wanted anchor then scores 64 with a standard deviation of 8, all others 0: the wanted stretches win for a whole run,
and spans move on by a key with each query. Which anchors of a near stretch win still changes, since several lie in it.
Two neighbours share 6 to 8 tenths of what their spans cover, of random inputs less than one (64K and 8K tokens, head
size 128). Heads choose apart. It is a model of trained routing, measured on none.
It does not know who reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = ("random", "trained")
_RUN = 256
_WANTED = 3
_NOISE = 0.5
_TOPIC = 8.0
_ROTATED_BYTES = 1 << 30
"""Keys and values that sets have together at least, so that none is still in a cache when its turn comes again."""


@dataclass(frozen=True)
class Shape:
    """One layer and how it is read."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int
    """Newest keys that `trained` queries want no topic of."""


@dataclass(frozen=True)
class Inputs:
    """Queries of the last T positions of a context, and all of its keys and values; contiguous."""

    q: Tensor
    """`[1, Hq, T, D]`"""
    k: Tensor
    """`[1, Hkv, N, D]`"""
    v: Tensor
    """`[1, Hkv, N, D]`"""

    @property
    def first(self) -> int:
        """Position of the first query."""
        return int(self.k.shape[2] - self.q.shape[2])

    def newest(self, queries: int) -> Inputs:
        """Return the same context read by its last queries alone."""
        return Inputs(self.q[:, :, self.q.shape[2] - queries :].contiguous(), self.k, self.v)


def make(shape: Shape, length: int, queries: int, routing: str, seed: int, sets: int = 1) -> list[Inputs]:
    """Return sets of inputs: queries are each set's own; the longer a context is, the more sets share its keys.

    Together they have about a GiB of keys and values, twice that where one context has most of it, and one context
    where it has more: no cache then holds what is read when it is read again.

    Args:
        shape: heads, sizes, type, device.
        length: N, tokens of the context.
        queries: T, at most N.
        routing: one of `ROUTINGS`.
        seed: which numbers.
        sets: how many.
    """
    generator = torch.Generator(shape.device).manual_seed(seed)
    size = 2 * shape.kv_heads * shape.head_dim * length * shape.dtype.itemsize
    apart = 1 if size > 2 * _ROTATED_BYTES else min(sets, max(2, -(-_ROTATED_BYTES // size)))
    contexts = [_context(shape, length, routing, generator) for _ in range(apart)]
    made = []
    for i in range(sets):
        k, v, topics = contexts[i % apart]
        q = torch.randn(1, shape.heads, queries, shape.head_dim, generator=generator, device=shape.device)
        if topics is not None:
            q = q * _NOISE + _TOPIC * _wanted(shape, topics, length, queries, generator)
        made.append(Inputs(q.to(shape.dtype), k, v))
    return made


def _context(
    shape: Shape, length: int, routing: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return keys, values, and for `trained` the topics `[Hkv, stretches, D]`."""
    size = (1, shape.kv_heads, length, shape.head_dim)
    k, v = (torch.randn(size, generator=generator, device=shape.device, dtype=shape.dtype) for _ in range(2))
    if routing == "random":
        return k, v, None
    stretch = _stretch(length)
    topics = torch.randn(
        shape.kv_heads, -(-length // stretch), shape.head_dim, generator=generator, device=shape.device
    )
    topics = torch.nn.functional.normalize(topics, dim=-1)
    k *= _NOISE
    for i in range(topics.shape[1]):  # in place, stretch by stretch: at 10M tokens a second copy would not fit
        k[0, :, i * stretch : (i + 1) * stretch] += (_TOPIC * topics[:, i : i + 1]).to(shape.dtype)
    return k, v, topics


def _wanted(shape: Shape, topics: Tensor, length: int, queries: int, generator: torch.Generator) -> Tensor:
    """Return the sum of the topics that every query wants, `[1, Hq, T, D]`; 0 where no stretch lies far enough back."""
    runs = -(-queries // _RUN)
    far = max(0, length - queries - shape.window) // _stretch(length)
    if far == 0:
        return torch.zeros(1, shape.heads, queries, shape.head_dim, device=shape.device)
    which = torch.randint(far, (shape.heads, runs, _WANTED), generator=generator, device=shape.device)
    group = shape.heads // shape.kv_heads
    own = torch.arange(shape.heads, device=shape.device).view(-1, 1, 1) // group
    wanted = topics[own, which].sum(-2)  # [Hq, runs, D]
    return wanted.repeat_interleave(_RUN, dim=1)[:, :queries].unsqueeze(0)


def _stretch(length: int) -> int:
    return 2 * math.ceil(math.sqrt(length))
