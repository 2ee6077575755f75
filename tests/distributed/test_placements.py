"""What placements say they cost is what the schemes send, by their own counters."""

import math

import pytest
import torch
from plain_ranks import inputs

from longspan.distributed import placements
from longspan.distributed.context_parallel import decode_attention, gather_attention
from longspan.distributed.layout import zigzag
from longspan.distributed.placements import Laid, Placement, Sent
from longspan.distributed.ring import ring_attention
from longspan.distributed.star import Star, star_attention
from longspan.errors import UnknownNameError, UsageError

LENGTH, DIM = 240, 8
TOKEN, PARTIAL = 2 * 2 * DIM * 4, 4 * (DIM + 1) * 4
"""Bytes of a token's keys and values in two heads, and of a partial output of four; float32."""


def laid(size, **more):
    return Laid(LENGTH, size, size, TOKEN, (PARTIAL,), **more)


def sent(group, queries):
    """Bytes that one layer sends for a context by each scheme, and for a token."""
    q, k, v = inputs(LENGTH)
    layout, star = zigzag(LENGTH, group.size), Star(LENGTH, group.size, 20)
    own = [layout.shard(x, group.rank) for x in (q, k, v)]
    read = [x[:, :, star.positions(group.rank)] for x in (q, k, v)]
    calls = {
        "ring": lambda: ring_attention(group, *own, layout),
        "context_parallel": lambda: gather_attention(group, *own, layout),
        "star": lambda: star_attention(star, group.rank, *read),
        "decode": lambda: decode_attention(
            group, torch.zeros(queries, 4, DIM), *(x.expand(queries, -1, -1, -1) for x in own[1:]), scale=1.0
        ),
    }
    found = {}
    for name, call in calls.items():
        group.sent.clear()
        call()
        found[name] = sum(group.sent.values())
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("queries", [1, 3000])
def test_bytes_are_those_that_are_counted(ranks, size, queries):
    found = ranks.run(sent, queries, size=size)
    for name in ("ring", "context_parallel", "star"):
        told = placements.placement(name).sends(laid(size, anchor=20, concurrent=queries))
        assert max(each[name] for each in found) == told.bytes, name
        assert max(each["decode"] for each in found) == (told.decode_bytes if size > 1 else 0)


@pytest.mark.parametrize("block", [None, 10, 60])
@pytest.mark.parametrize("anchor", [None, 5])
def test_star_computes_the_pairs_that_it_says(block, anchor):
    star = Star(LENGTH, 4, anchor, block)
    keys = torch.arange(LENGTH)
    read = star.positions(3)
    own = star.layout.counts[3]
    pairs = sum(
        int(((keys <= t) & ((keys < star.anchor_tokens) | (keys // star.block_tokens == t // star.block_tokens))).sum())
        for t in read.tolist()
    )
    told = placements.placement("star").sends(laid(4, anchor=anchor, block=block))
    assert told.attention * LENGTH**2 / 2 == pytest.approx(pairs, abs=LENGTH)  # a triangle's diagonal
    assert told.rest == (star.anchor_tokens + own) / LENGTH


def test_the_registry():
    names = list(placements.PLACEMENTS)
    assert names[:3] == ["ring", "context_parallel", "star"]
    with pytest.raises(UsageError, match="'ring' is registered already"):
        placements.register(Placement("ring", "", True, (), lambda _: Sent(0, 0, 0, 0, True, 0, 0, 0)))
    with pytest.raises(UnknownNameError, match="use one of auto, ring, context_parallel, star"):
        placements.placement("circle")
    with pytest.raises(UsageError, match="longer than the context: give at most 240"):
        placements.placement("star").sends(laid(2, anchor=300))


def test_many_partials_go_through_a_tree():
    few, many = placements.merge_bytes((1000.0,), 8), placements.merge_bytes((1e6,), 8)
    assert few == 7 * 1000 and many == 1e6 * math.log2(8)
