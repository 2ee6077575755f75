"""Every position is held once, whatever the length, the order and the number of ranks."""

import pytest
import torch

from longspan.distributed.layout import contiguous, interleaved, zigzag
from longspan.errors import UsageError

ORDERS = {
    "zigzag": zigzag,
    "contiguous": contiguous,
    "pages": lambda length, ranks, first=0: contiguous(length, ranks, first, multiple=8),
    "interleaved": lambda length, ranks, first=0: interleaved(length, ranks, first, block=8),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 131])
@pytest.mark.parametrize("first", [0, 5])
def test_positions_are_held_once_and_come_back(order, ranks, length, first):
    layout = ORDERS[order](length, ranks, first)
    held = [layout.positions(rank) for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(first, first + length))
    assert [len(x) for x in held] == list(layout.counts)
    assert all(bool((x.diff() > 0).all()) for x in held)
    assert layout.ranks == ranks and (length == 0 or (layout.first, layout.stop) == (first, first + length))
    x = torch.randn(2, length, 3)
    shards = [layout.shard(x, rank, 1) for rank in range(ranks)]
    for shard, at in zip(shards, held, strict=True):
        assert torch.equal(shard, x[:, at - first])
    assert torch.equal(layout.whole(shards, 1), x)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_positions(order):
    layout = ORDERS[order](50, 3, 4)
    for rank in range(3):
        held = layout.positions(rank)
        for position in range(60):
            assert layout.before(rank, position) == int((held < position).sum())
    for position in range(4, 54):
        rank, row = layout.place(position)
        assert layout.positions(rank)[row] == position
    with pytest.raises(UsageError, match="position 54 is not among 4 to 53"):
        layout.place(54)


def test_zigzag_balances_causal_work():
    layout = zigzag(1024, 4)
    work = [int((layout.positions(rank) + 1).sum()) for rank in range(4)]
    assert max(work) - min(work) <= 0.001 * max(work)
    assert layout.runs[1] == ((128, 256), (768, 896))


def test_chunks_add_up():
    whole = zigzag(37, 3) + zigzag(20, 3, 37) + zigzag(1, 3, 57)
    assert sorted(torch.cat([whole.positions(rank) for rank in range(3)]).tolist()) == list(range(58))
    x = torch.randn(1, 2, 58, 4)
    assert torch.equal(whole.whole([whole.shard(x, rank) for rank in range(3)]), x)
    with pytest.raises(AssertionError, match="no chunk between"):
        zigzag(37, 3) + zigzag(20, 3, 38)


def test_interleaved_does_not_move_what_it_holds():
    short, long = interleaved(100, 3), interleaved(1000, 3)
    for rank in range(3):
        held = short.positions(rank)
        assert torch.equal(held, long.positions(rank)[: len(held)])


def test_nonsense_is_refused():
    with pytest.raises(UsageError, match="give at least 0 and 1"):
        zigzag(-1, 2)
