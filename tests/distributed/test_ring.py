"""The ring equals dense attention on one rank: outputs, gradients, chunks, odd lengths, and what it sends."""

import itertools

import pytest
import torch
from plain_ranks import dense, inputs

from longspan.distributed.layout import contiguous, zigzag
from longspan.distributed.ring import ring_attention
from longspan.errors import UsageError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
"""In half types of outputs of about 1, rounded once."""
CASES = [
    dict(length=1), dict(length=2), dict(length=5), dict(length=37), dict(length=64), dict(length=131),
    dict(length=1100, heads=(2, 1)),
    dict(length=37, heads=(3, 3)), dict(length=37, heads=(3, 1)), dict(length=37, heads=(16, 1)),
    dict(length=50, batch=2), dict(length=50, dims=(16, 6)),
    dict(length=61, dtype=torch.float64), dict(length=61, dtype=torch.bfloat16), dict(length=61, dtype=torch.float16),
]  # fmt: skip


def attend(group, order, cases):
    """This rank's outputs of many cases, and the bytes of each."""
    found = []
    for case in cases:
        q, k, v = inputs(**case)
        layout = order(q.shape[2], group.size)
        before = group.sent["ring"]
        with torch.no_grad():
            out = ring_attention(group, *(layout.shard(x, group.rank) for x in (q, k, v)), layout)
        found.append((out, group.sent["ring"] - before))
    return found


@pytest.mark.parametrize("order", [zigzag, contiguous])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_it_is_dense_attention(ranks, size, order):
    found = ranks.run(attend, order, CASES, size=size)
    for number, case in enumerate(CASES):
        q, k, v = inputs(**case)
        layout = order(q.shape[2], size)
        shards = [each[number][0] for each in found]
        assert all(shard.dtype == q.dtype for shard in shards)
        error = (layout.whole(shards).double() - dense(q, k, v)).abs().max()
        assert error <= TOLERANCE[q.dtype], case
        # Each rank hands on all blocks but the next rank's own.
        token = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        wanted = [token * (layout.stop - layout.counts[(rank + 1) % size]) for rank in range(size)]
        assert [each[number][1] for each in found] == ([0] if size == 1 else wanted)


def poisoned(group, length):
    q, k, v = inputs(length)
    k[:, :, -1], v[:, :, -1] = float("nan"), float("inf")
    layout = zigzag(length, group.size)
    return ring_attention(group, *(layout.shard(x, group.rank) for x in (q, k, v)), layout)


def test_what_is_hidden_reaches_no_output(ranks):
    out = zigzag(45, 3).whole(ranks.run(poisoned, 45, size=3))
    q, k, v = inputs(45)
    assert (out[:, :, :-1].double() - dense(q, k, v)[:, :, :-1]).abs().max() < 3e-6
    assert not bool(torch.isfinite(out[:, :, -1]).any())


def chunks(group, edges):
    """Read a context chunk by chunk; keys of all chunks before stay where they are."""
    q, k, v = inputs(edges[-1])
    past, held, outs = zigzag(0, group.size), [k[:, :, :0], v[:, :, :0]], []
    for start, stop in itertools.pairwise(edges):
        layout = zigzag(stop - start, group.size, start)
        own = [layout.shard(x[:, :, start:stop], group.rank) for x in (q, k, v)]
        held = [torch.cat([old, new], 2) for old, new in zip(held, own[1:], strict=True)]
        past = past + layout
        outs.append(ring_attention(group, own[0], *held, layout, past))
    return outs


@pytest.mark.parametrize("size", [2, 3, 4])
def test_chunks_are_the_whole(ranks, size):
    edges = [0, 40, 41, 64, 101, 103]
    found = ranks.run(chunks, edges, size=size)
    q, k, v = inputs(edges[-1])
    parts = [
        zigzag(stop - start, size, start).whole([each[number] for each in found])
        for number, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    assert (torch.cat(parts, 2).double() - dense(q, k, v)).abs().max() < 3e-6


def gradients(group, cases, order):
    found = []
    for case in cases:
        q, k, v = (x.requires_grad_() for x in inputs(**case))
        layout = order(q.shape[2], group.size)
        own = [layout.shard(x, group.rank) for x in (q, k, v)]
        out = ring_attention(group, *own, layout)
        upstream = inputs(**case, seed=9)[0].sin()[..., : v.shape[-1]]
        found.append(torch.autograd.grad(out, own, layout.shard(upstream, group.rank)))
    return found


GRADIENTS = [
    dict(length=1), dict(length=6), dict(length=53), dict(length=600, heads=(2, 1)), dict(length=37, heads=(3, 1)),
    dict(length=50, batch=2, heads=(4, 4)), dict(length=61, dtype=torch.float64), dict(length=40, dims=(8, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("size", "order"), [(1, zigzag), (2, zigzag), (3, zigzag), (4, zigzag), (3, contiguous)])
def test_gradients_are_those_of_dense_attention(ranks, size, order):
    found = ranks.run(gradients, GRADIENTS, order, size=size)
    for number, case in enumerate(GRADIENTS):
        q, k, v = (x.requires_grad_() for x in inputs(**case))
        layout = order(q.shape[2], size)
        upstream = inputs(**case, seed=9)[0].sin()[..., : v.shape[-1]].double()
        wanted = torch.autograd.grad(dense(q, k, v), (q, k, v), upstream)
        for index, gradient in enumerate(wanted):
            whole = layout.whole([each[number][index] for each in found])
            assert whole.dtype == q.dtype
            assert (whole - gradient).abs().max() <= 3 * TOLERANCE[q.dtype], (case, "qkv"[index])


def misuse(group):
    q, k, v = inputs(12)
    told = []
    for given, queries in (
        ((q, k, v), zigzag(12, group.size)),
        ((q, k, v), zigzag(12, group.size + 1)),
        ((q[:, :3], k, v), contiguous(12, 1)),
    ):
        try:
            ring_attention(group, *given, queries)
        except UsageError as error:
            told.append(str(error))
    return told


def test_misuse_is_told(ranks):
    told = ranks.run(misuse, size=2)[1]
    assert told[0] == "rank 1 of 2: q is (1, 4, 12, 8) where its layout has 6 rows: shard it by that"
    assert told[1].endswith("a layout over 3 and 3 ranks: lay both over 2") and len(told) == 3
    assert "a multiple of KV heads" in ranks.run(misuse, size=1)[0][-1]
