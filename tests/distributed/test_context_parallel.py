"""Gathered, spread and decoded attention equal dense attention on one rank; what is sent in decode knows no length."""

import math

import pytest
import torch
from plain_ranks import dense, inputs

from longspan.distributed.context_parallel import choose, decode_attention, gather_attention, spread_attention
from longspan.distributed.layout import contiguous, held_by, interleaved, zigzag
from longspan.errors import UsageError

CASES = [
    dict(length=1), dict(length=3), dict(length=37), dict(length=130), dict(length=37, heads=(3, 3)),
    dict(length=37, heads=(16, 1)), dict(length=50, batch=2, dims=(16, 6)), dict(length=61, dtype=torch.float64),
    dict(length=61, dtype=torch.bfloat16),
]  # fmt: skip
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}


def gather(group, cases):
    found = []
    for case in cases:
        q, k, v = inputs(**case)
        order = zigzag(q.shape[2], group.size)
        pages = interleaved(q.shape[2], group.size, block=8)
        own = order.shard(q, group.rank), pages.shard(k, group.rank), pages.shard(v, group.rank)
        found.append(gather_attention(group, *own, order, pages))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gathered_is_dense(ranks, size):
    found = ranks.run(gather, CASES, size=size)
    for number, case in enumerate(CASES):
        q, k, v = inputs(**case)
        out = zigzag(q.shape[2], size).whole([each[number] for each in found])
        assert out.dtype == q.dtype and (out.double() - dense(q, k, v)).abs().max() <= TOLERANCE[q.dtype], case


def spread(group, cases, counts):
    """The last `count` positions of each case ask; their keys lie on the last rank, those before over all."""
    found = []
    for case in cases:
        for count in counts:
            length = case["length"]
            asked = min(count, length)
            q, k, v = inputs(queries=asked, **case)
            past = contiguous(length - asked, group.size)
            layout = past + held_by(group.size - 1, asked, group.size, length - asked)
            own = layout.shard(k, group.rank), layout.shard(v, group.rank)
            before = sum(group.sent.values())
            out = spread_attention(group, q, *own, length - asked, layout)
            found.append((out, sum(group.sent.values()) - before))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_spread_is_dense_and_alike_on_every_rank(ranks, size):
    counts = (1, 6, 200)
    found = ranks.run(spread, CASES, counts, size=size)
    for number, case in enumerate(CASES):
        for index, count in enumerate(counts):
            q, k, v = inputs(queries=min(count, case["length"]), **case)
            outs = [each[number * len(counts) + index][0] for each in found]
            assert all(torch.equal(out, outs[0]) for out in outs)
            assert (outs[0].double() - dense(q, k, v)).abs().max() <= TOLERANCE[q.dtype], (case, count)


def test_what_is_sent_for_a_token_does_not_depend_on_the_context(ranks):
    cases = [dict(length=20), dict(length=2000)]
    short, long = ranks.run(spread, cases, (1,), size=3)[1]
    assert short[1] == long[1] == 2 * 4 * (8 + 1) * 4  # to two others: heads, output and log-sum-exp, float32


def decode(group, lengths):
    """One token of two sequences, of which ranks hold different numbers of keys, in room for more."""
    q, k, v = inputs(48, 1, batch=2)
    layouts = [contiguous(length, group.size) for length in lengths]
    counts = torch.tensor([layout.counts[group.rank] for layout in layouts])
    room = [torch.full((2, 2, 50, 8), float("nan")) for _ in range(2)]
    for sequence, layout in enumerate(layouts):
        for own, x in zip(room, (k, v), strict=True):
            shard = layout.shard(x[sequence : sequence + 1], group.rank)[0]
            own[sequence, :, : shard.shape[1]] = shard
    ragged = decode_attention(group, q[:, :, 0], *room, counts, scale=1 / math.sqrt(8))
    whole = contiguous(48, group.size)
    even = decode_attention(
        group, q[:, :, 0], whole.shard(k, group.rank), whole.shard(v, group.rank), scale=1 / math.sqrt(8)
    )
    return ragged, even


@pytest.mark.parametrize("size", [1, 2, 4])
def test_decode_is_dense(ranks, size):
    q, k, v = inputs(48, 1, batch=2)
    for ragged, even in ranks.run(decode, [48, 3], size=size):
        assert (even.double() - dense(q, k, v)[:, :, 0]).abs().max() < 3e-6
        assert (ragged[0].double() - dense(q, k, v)[0, :, 0]).abs().max() < 3e-6
        assert (ragged[1].double() - dense(q, k[:, :, :3], v[:, :, :3])[1, :, 0]).abs().max() < 3e-6


def test_which_scheme_serves():
    token, query = 2 * 8 * 128 * 2, 32 * (128 * 2 + 129 * 4)
    assert choose(1, 1 << 20, 8, query, token) == "spread"
    assert choose(4096, 4096, 2, query, token) == "gather"
    assert choose(1 << 20, 1 << 20, 8, query, token) == "ring"
    assert choose(256, 1 << 20, 8, query, token) == "spread"
    assert choose(32768, 1 << 20, 8, query, token) == "ring"
    assert choose(32768, 32768, 1, query, token) == "spread"


def test_gathered_gives_no_gradients(ranks):
    from longspan.distributed.group import Group

    q, k, v = (x.requires_grad_() for x in inputs(8))
    with pytest.raises(UsageError, match="use ring_attention"):
        gather_attention(Group.alone(), q, k, v, zigzag(8, 1))
