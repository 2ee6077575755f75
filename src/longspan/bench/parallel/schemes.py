"""The schemes that are measured: what each rank reads, how it attends, and what its outputs must be.

It does not know how they are timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longspan.bench.parallel.truth import Seen, causal
from longspan.distributed import torch_peer
from longspan.distributed.context_parallel import gather_attention
from longspan.distributed.group import Group
from longspan.distributed.layout import Layout, Run, contiguous, zigzag
from longspan.distributed.ring import ring_attention
from longspan.distributed.star import Star, star_attention
from longspan.errors import UnknownNameError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """One way to read a context, on this rank."""

    name: str
    reads: tuple[Run, ...]
    """Positions of its queries, keys and values, in the order of its rows."""
    held: tuple[Run, ...]
    """Positions that it is alone to hold: the last of `reads`."""
    seen: Seen
    attend: Attend
    pairs: float
    """Pairs of a query and a key that the busiest rank computes, a head."""
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """What must be active while it attends."""
    missing: str | None = None
    """Why it can't serve here."""


def _even(name: str, layout: Layout, group: Group, attend: Attend, **more: Any) -> Scheme:
    own = layout.runs[group.rank]
    return Scheme(name, own, own, causal, attend, layout.stop * (layout.stop + 1) / 2 / group.size, **more)


def _ring(group: Group, length: int, _: Star) -> Scheme:
    layout = zigzag(length, group.size)
    return _even("ring", layout, group, lambda q, k, v: ring_attention(group, q, k, v, layout))


def _gather(group: Group, length: int, _: Star) -> Scheme:
    layout = zigzag(length, group.size)
    return _even("context_parallel", layout, group, lambda q, k, v: gather_attention(group, q, k, v, layout))


def _star(group: Group, length: int, star: Star) -> Scheme:
    own, anchor, block = star.layout.runs[group.rank], star.anchor_tokens, star.block_tokens
    prefix = star.prefix(group.rank)

    def pairs(rank: int) -> float:
        count, first = star.layout.counts[rank], star.prefix(rank)
        whole, rest = divmod(count, block)
        own_pairs = whole * block * (block + 1) / 2 + rest * (rest + 1) / 2
        behind = count if first else max(0, count - block)
        return first * (first + 1) / 2 + own_pairs + behind * anchor

    return Scheme(
        "star",
        ((0, prefix), *own) if prefix else own,
        own,
        lambda t, keys: (keys <= t) & ((keys < anchor) | (keys // block == t // block)),
        lambda q, k, v: star_attention(star, group.rank, q, k, v),
        max(pairs(rank) for rank in range(group.size)),
    )


def _torch(rotation: str, expanded: bool) -> Callable[[Group, int, Star], Scheme]:
    def made(group: Group, length: int, _: Star) -> Scheme:
        name = {"allgather": "torch", "alltoall": "torch_alltoall"}[rotation] + ("_expanded" if expanded else "")
        return _even(
            name,
            zigzag(length, group.size),
            group,
            lambda q, k, v: torch_peer.attend(q, k, v, expanded=expanded),
            around=lambda: torch_peer.active(group, rotation),
            missing=torch_peer.refuses(group, length),
        )

    return made


SCHEMES: dict[str, Callable[[Group, int, Star], Scheme]] = {
    "ring": _ring,
    "context_parallel": _gather,
    "star": _star,
    "torch": _torch("allgather", expanded=False),
    "torch_alltoall": _torch("alltoall", expanded=False),
    "torch_expanded": _torch("allgather", expanded=True),
}
"""By name: what makes a scheme for a group, a length and star's options."""


def scheme(name: str, group: Group, length: int, star: Star) -> Scheme:
    """Return a scheme by name (UnknownNameError lists the names)."""
    if name not in SCHEMES:
        raise UnknownNameError(f"unknown scheme {name!r}: use one of {', '.join(SCHEMES)}")
    return SCHEMES[name](group, length, star)


def decode_layout(group: Group, length: int) -> Layout:
    """Return where keys lie for a decode step: even shares, one after the other."""
    return contiguous(length, group.size)
