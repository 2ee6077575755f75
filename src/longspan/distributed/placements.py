"""The registry of placements: how one context lies over ranks, with what each costs; nothing else lists them.

A cost is told in tokens, passes, bytes and shares of one device's work. It is what the schemes of this room do, so that
their own counters give the same bytes (`tests/distributed/test_placements.py`); what it takes in seconds is the
planner's. It knows no devices, no models and no tensors, and loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from longspan.errors import UnknownNameError, UsageError

GATHERED = 1 << 20
"""Bytes that all ranks' partial outputs may have together to be gathered in one message; above, a tree halves them."""


@dataclass(frozen=True)
class Laid:
    """A context and the ranks that share it."""

    tokens: int
    ranks: int
    per_node: int
    """Ranks of one node."""
    token_bytes: float
    """Bytes of one token's keys and values, as they travel, in all layers that see the whole context."""
    partials: tuple[float, ...]
    """Bytes of one query's partial output and log-sum-exps, in each of these layers, in float32."""
    concurrent: int = 1
    """Contexts that are decoded at once."""
    anchor: int | None = None
    """Tokens of star's anchor; None: a block's."""
    block: int | None = None
    """Tokens of star's blocks; None: a rank's share."""

    @property
    def own(self) -> int:
        """Tokens that a rank holds, at most."""
        return -(-self.tokens // self.ranks)


@dataclass(frozen=True)
class Sent:
    """What a placement makes of one context."""

    rank_tokens: int
    """Tokens of context that a rank holds."""
    steps: int
    """Compute steps a layer."""
    passes: int
    """Times that each rank sends to others in a layer."""
    bytes: float
    """Bytes that a rank sends in prefill, in all layers."""
    beside: bool
    """Whether they are sent while it computes."""
    attention: float
    """Attention's FLOPs of one rank, as a share of one device's alone."""
    rest: float
    """All other FLOPs of prefill, likewise."""
    decode_bytes: float
    """Bytes that a rank sends for one decoded token."""
    across: float = 0.0
    """Bytes of those of prefill that the busiest rank sends to another node."""


@dataclass(frozen=True)
class Placement:
    """A way to lay one context over ranks."""

    name: str
    about: str
    exact: bool
    """Whether results are those of one device with the same mechanism."""
    suits: tuple[str, ...]
    """The mechanisms that it distributes; (): what is read is looked for on every rank, so those that search."""
    sends: Callable[[Laid], Sent]


def merge_bytes(partials: tuple[float, ...], ranks: int) -> float:
    """Return the bytes that a rank sends to merge partial outputs of these sizes, one merge each (`Group.merge`)."""
    if ranks == 1:
        return 0.0
    gathered, tree = ranks - 1, math.ceil(math.log2(ranks))
    return sum(each * (gathered if each * ranks <= GATHERED else tree) for each in partials)


def _merged(laid: Laid) -> float:
    return merge_bytes(tuple(laid.concurrent * each for each in laid.partials), laid.ranks)


def _ring(laid: Laid) -> Sent:
    p = laid.ranks
    sent = (p - 1) * laid.own * laid.token_bytes
    # Every block passes between two nodes over the one adapter of the rank that stands at the edge.
    across = sent if p > laid.per_node else 0.0
    return Sent(laid.own, p, p - 1, sent, True, 1 / p, 1 / p, _merged(laid), across)


def _context_parallel(laid: Laid) -> Sent:
    p = laid.ranks
    sent = (p - 1) * laid.own * laid.token_bytes
    # A node fetches what other nodes hold once, by all of its adapters together.
    across = (p - laid.per_node) / laid.per_node * laid.own * laid.token_bytes
    return Sent(laid.own, 1, 1, sent, False, 1 / p, 1 / p, _merged(laid), across)


def _star(laid: Laid) -> Sent:
    p, own = laid.ranks, laid.own
    block = min(laid.block or own, own)
    anchor = block if laid.anchor is None else laid.anchor
    if anchor > laid.tokens:
        raise UsageError(f"an anchor of {anchor:,} tokens is longer than the context: give at most {laid.tokens:,}")
    anchor = anchor if p > 1 else 0
    # Every rank reads the anchor itself, before its own blocks; nothing is sent until a question comes.
    pairs = anchor**2 + own * (block + 2 * anchor)
    return Sent(own, 1, 0, 0.0, True, pairs / laid.tokens**2, (anchor + own) / laid.tokens, _merged(laid))


def _sharded(laid: Laid) -> Sent:
    p = laid.ranks
    # Every query's candidates are scored where they lie; scores of its choice and partial outputs travel.
    sent = laid.own * (p - 1) / p * 2 * sum(laid.partials)
    nodes = p / laid.per_node
    return Sent(laid.own, 1, 2, sent, False, 1 / p, 1 / p, 2 * _merged(laid), sent * (nodes - 1) / nodes)


PLACEMENTS: dict[str, Placement] = {}
"""By name, in the order in which they are tried."""


def register(placement: Placement) -> None:
    """Register a placement. A name can be taken once (UsageError)."""
    if placement.name in PLACEMENTS:
        raise UsageError(f"a placement named {placement.name!r} is registered already")
    PLACEMENTS[placement.name] = placement


register(Placement("ring", "keys and values go round, beside compute", True, ("dense", "xattention"), _ring))
register(
    Placement(
        "context_parallel", "every rank gathers all keys and values of a layer", True, ("dense",), _context_parallel
    )
)
register(Placement("star", "anchor and own block, then questions merge over all ranks", False, ("dense",), _star))
register(Placement("sharded", "every rank searches its own tokens; outputs are merged", True, (), _sharded))


def placement(name: str) -> Placement:
    """Return a placement by name (UnknownNameError lists the names)."""
    if name not in PLACEMENTS:
        raise UnknownNameError(f"unknown placement {name!r}: use one of auto, {', '.join(PLACEMENTS)}")
    return PLACEMENTS[name]
