"""One context over several GPUs and nodes: named placements, each with what it computes and sends.

Times are a model of compute, links within a host and a network between hosts. Every rank holds its share of a context's
keys and values; weights are held by all unless they are split. It knows no process groups: a placement is planned here
whether or not it can be run yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from longspan.errors import UnknownNameError, UsageError
from longspan.planner import times
from longspan.planner.devices import NETWORK
from longspan.planner.measured import Range, Source, plus
from longspan.planner.memory import mechanism
from longspan.planner.model import Model
from longspan.planner.times import Work

_LINK_SHARE, _NETWORK_SHARE = (0.6, 0.9), (0.5, 0.9)
"""Shares of a link's and a network's nominal bandwidth that large messages reach."""
_LATENCY = {True: 40e-6, False: 15e-6}
"""Seconds of one small collective, across hosts (True) or within one (NCCL's usual order of magnitude)."""
_OVERLAP = 0.05
"""Share of what is sent beside compute that still costs time: both use the same memory."""


@dataclass(frozen=True)
class Ranks:
    """GPUs that share one context."""

    gpus: int = 1
    nodes: int = 1
    network: float = NETWORK
    """Bytes a second that one GPU sends to another node."""
    anchor: int | None = None
    """Tokens of star's anchor block; None: as many as a rank's own block."""
    split: bool = False
    """Whether weights are split over the ranks instead of held by each."""

    @property
    def count(self) -> int:
        """How many there are in all."""
        return self.gpus * self.nodes


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
    """Attention's FLOPs of one rank, as a share of one GPU's alone."""
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
    """Whether results are those of one GPU with the same mechanism."""
    suits: tuple[str, ...]
    """The mechanisms that it distributes; (): what is read is looked for on every rank, so those that search."""
    sends: Callable[[Work, Ranks], Sent]


def _kv_bytes(work: Work, tokens: float) -> float:
    """Return the bytes of the keys and values of so many tokens in all layers that see the whole context."""
    number = work.own if work.kv in ("bf16", "fp16", "fp32") else 1.0
    return tokens * number * work.model.token_numbers()


def _partials(model: Model) -> float:
    """Return the bytes of one query's partial outputs and their log-sum-exps in all layers, in float32."""
    return sum(4.0 * each.query_heads * (each.value_dim + 1) for each in model.attending if each.window is None)


def _merge(work: Work, ranks: Ranks) -> float:
    """Return the bytes that a rank sends to merge one token's partial outputs: a tree of log2 steps."""
    return work.concurrent * math.ceil(math.log2(max(2, ranks.count))) * _partials(work.model)


def _ring(work: Work, ranks: Ranks) -> Sent:
    p = ranks.count
    own = -(-work.n // p)
    sent = (p - 1) * _kv_bytes(work, own)
    # Every block passes between two nodes over the one adapter of the GPU that stands at the edge.
    across = sent if ranks.nodes > 1 else 0.0
    return Sent(own, p, p - 1, sent, True, 1 / p, 1 / p, _merge(work, ranks), across)


def _context_parallel(work: Work, ranks: Ranks) -> Sent:
    p = ranks.count
    own = -(-work.n // p)
    sent = (p - 1) * _kv_bytes(work, own)
    # A node fetches what other nodes hold once, by all of its adapters together.
    across = (p - ranks.gpus) / ranks.gpus * _kv_bytes(work, own)
    return Sent(own, 1, 1, sent, False, 1 / p, 1 / p, _merge(work, ranks), across)


def _star(work: Work, ranks: Ranks) -> Sent:
    p = ranks.count
    own = -(-work.n // p)
    anchor = own if ranks.anchor is None else ranks.anchor
    if anchor > work.n:
        raise UsageError(f"an anchor of {anchor:,} tokens is longer than the context: give at most {work.n:,}")
    anchor = anchor if p > 1 else 0
    # The anchor is read by every rank together with its own block; nothing is sent until a question comes.
    seen = anchor + own
    return Sent(own, 1, 0, 0.0, True, (seen / work.n) ** 2, seen / work.n, _merge(work, ranks))


def _sharded(work: Work, ranks: Ranks) -> Sent:
    p = ranks.count
    own = -(-work.n // p)
    # Every query's candidates are scored where they lie; scores of its choice and partial outputs travel.
    sent = own * (p - 1) / p * 2 * _partials(work.model)
    across = sent * (ranks.nodes - 1) / ranks.nodes
    return Sent(own, 1, 2, sent, False, 1 / p, 1 / p, 2 * _merge(work, ranks), across)


PLACEMENTS = {
    each.name: each
    for each in (
        Placement("ring", "keys and values go round, beside compute", True, ("dense", "xattention"), _ring),
        Placement("context_parallel", "every rank gathers all keys and values of a layer", True, ("dense",),
                  _context_parallel),
        Placement("star", "anchor and own block, then questions merge over all ranks", False, ("dense",), _star),
        Placement("sharded", "every rank searches its own tokens; outputs are merged", True, (), _sharded),
    )
}  # fmt: skip
"""By name, in the order in which they are tried."""


def placement(name: str, attention: str) -> Placement:
    """Return a placement by name for a mechanism; `auto`: ring where it serves, else sharded.

    Raises:
        UnknownNameError: no such placement.
        UsageError: it does not distribute that mechanism.
    """
    kind = attention.partition(":")[0]
    if name == "auto":
        name = "ring" if kind in PLACEMENTS["ring"].suits else "sharded"
    if name not in PLACEMENTS:
        raise UnknownNameError(f"unknown placement {name!r}: use one of auto, {', '.join(PLACEMENTS)}")
    found = PLACEMENTS[name]
    if not fits(found, attention):
        suiting = [each.name for each in PLACEMENTS.values() if fits(each, attention)]
        advice = f"use {' or '.join(suiting)}" if suiting else "use one GPU"
        raise UsageError(f"placement {name!r} does not distribute attention {kind!r}: {advice}")
    return found


def fits(found: Placement, attention: str) -> bool:
    """Return whether a placement distributes a mechanism."""
    kind = attention.partition(":")[0]
    if found.suits:
        return kind in found.suits
    chosen = mechanism(attention)
    # What keeps everything and reads a part of it can be searched for part by part.
    return not (chosen.reads_all or chosen.bounded_memory or chosen.prefill_only or chosen.evicts)


def prefill(work: Work, ranks: Ranks, how: Placement) -> Range:
    """Return the seconds of reading one context over ranks."""
    sent = how.sends(work, ranks)
    part = replace(work, n=max(1, round(sent.rest * work.n)))
    compute = plus(
        _scaled(times.prefill_attention(work), sent.attention),
        # Weights are read by every rank, and each computes its own tokens.
        times.prefill_rest(part),
    )
    return _together(compute, _sending(sent.bytes, sent.across, ranks, work), sent.beside)


def decode(work: Work, ranks: Ranks, how: Placement) -> Range:
    """Return the seconds of one decode step over ranks."""
    sent = how.sends(work, ranks)
    share = replace(work, n=sent.rank_tokens)
    rest = times.decode_rest(work)
    if ranks.split:
        rest = _scaled(rest, 1 / ranks.count)
    collectives = len(work.model.attending) * (2 if ranks.split or how.name == "sharded" else 1)
    wait = collectives * _LATENCY[ranks.nodes > 1] * math.ceil(math.log2(max(2, ranks.count)))
    return plus(
        times.decode_attention(share),
        rest,
        _sending(sent.decode_bytes, sent.decode_bytes if ranks.nodes > 1 else 0.0, ranks, work),
        Range(wait / 2, 2 * wait),
    )


def _sending(count: float, across: float, ranks: Ranks, work: Work) -> Range:
    """Return the seconds that a rank takes to send bytes, of which some go to another node."""
    if not count:
        return Range(0.0, 0.0)
    (low, high), (slow, fast) = _LINK_SHARE, _NETWORK_SHARE
    within, beyond = (count - across) / work.device.link, across / ranks.network
    told = Source("", 0, f"links at {100 * low:.0f} to {100 * high:.0f} % of their nominal bandwidth, not measured")
    return Range(within / high + beyond / fast, within / low + beyond / slow, (told,))


def _together(compute: Range, sending: Range, beside: bool) -> Range:
    if not beside:
        return plus(compute, sending)
    by = tuple(dict.fromkeys((*compute.by, *sending.by)))
    low = max(compute.low, sending.low) + _OVERLAP * min(compute.low, sending.low)
    return Range(low, max(compute.high, sending.high) + _OVERLAP * min(compute.high, sending.high), by)


def _scaled(given: Range, factor: float) -> Range:
    return Range(given.low * factor, given.high * factor, given.by)
