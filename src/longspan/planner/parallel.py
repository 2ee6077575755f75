"""One context over several GPUs and nodes: what placements compute and send (`distributed/placements.py`), in seconds.

Times are a model of compute, links within a host and a network between hosts. Every rank holds its share of a context's
keys and values; weights are held by all unless they are split. It knows no process groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from longspan.distributed import placements
from longspan.distributed.placements import PLACEMENTS, Laid, Placement, Sent
from longspan.errors import UsageError
from longspan.planner import times
from longspan.planner.devices import NETWORK
from longspan.planner.measured import Range, Source, plus
from longspan.planner.memory import mechanism
from longspan.planner.times import Work

__all__ = ["PLACEMENTS", "Placement", "Ranks", "Sent", "decode", "fits", "placement", "prefill", "sent"]

_LINK_SHARE, _NETWORK_SHARE = (0.6, 0.9), (0.5, 0.9)
"""Shares of a link's and a network's nominal bandwidth that large messages reach."""
_LATENCY = {True: 65e-6, False: 40e-6}
"""Seconds of one small collective with the merge behind it, across hosts (True) or within one. A decode step over two
H100 takes 75 to 95 us more than half of one's (docs/parallel_attention.md), of which some 40 are its kernels' own;
across hosts NCCL's usual 25 us come on top, not measured."""
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


def sent(how: Placement, work: Work, ranks: Ranks) -> Sent:
    """Return what a placement makes of a context (UsageError: star's anchor is longer than it)."""
    return how.sends(
        Laid(
            tokens=work.n,
            ranks=ranks.count,
            per_node=ranks.gpus,
            token_bytes=_token_bytes(work),
            partials=tuple(4.0 * each.query_heads * (each.value_dim + 1) for each in work.model.attending
                           if each.window is None),
            concurrent=work.concurrent,
            anchor=ranks.anchor,
        )
    )  # fmt: skip


def _token_bytes(work: Work) -> float:
    """Return the bytes of one token's keys and values in all layers that see the whole context."""
    number = work.own if work.kv in ("bf16", "fp16", "fp32") else 1.0
    return number * work.model.token_numbers()


def placement(name: str, attention: str) -> Placement:
    """Return a placement by name for a mechanism; `auto`: ring where it serves, else sharded.

    Raises:
        UnknownNameError: no such placement.
        UsageError: it does not distribute that mechanism.
    """
    kind = attention.partition(":")[0]
    if name == "auto":
        name = "ring" if kind in PLACEMENTS["ring"].suits else "sharded"
    found = placements.placement(name)
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
    told = sent(how, work, ranks)
    part = replace(work, n=max(1, round(told.rest * work.n)))
    compute = plus(
        _scaled(times.prefill_attention(work), told.attention),
        # Weights are read by every rank, and each computes its own tokens.
        times.prefill_rest(part),
    )
    return _together(compute, _sending(told.bytes, told.across, ranks, work), told.beside)


def decode(work: Work, ranks: Ranks, how: Placement) -> Range:
    """Return the seconds of one decode step over ranks."""
    told = sent(how, work, ranks)
    share = replace(work, n=told.rank_tokens)
    rest = times.decode_rest(work)
    if ranks.split:
        rest = _scaled(rest, 1 / ranks.count)
    collectives = len(work.model.attending) * (2 if ranks.split or how.name == "sharded" else 1)
    wait = collectives * _LATENCY[ranks.nodes > 1] * math.ceil(math.log2(max(2, ranks.count)))
    return plus(
        times.decode_attention(share),
        rest,
        _sending(told.decode_bytes, told.decode_bytes if ranks.nodes > 1 else 0.0, ranks, work),
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
