"""Which tokens a rank holds: each lies on one rank, in order, and stretches of tokens are stretches of rows."""

import pytest
import torch

from longspan.distributed.shards import ShardRotary, Shards
from longspan.kv.base import PAGE
from longspan.kv.rotary import Rotary

LENGTHS = (0, 1, 63, 64, 65, 200, 1024, 1025, 5000)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("unit", [PAGE, 16 * PAGE])
def test_every_token_lies_on_one_rank_in_order(ranks, unit):
    for length in LENGTHS:
        held = []
        for rank in range(ranks):
            shards = Shards(rank, ranks, unit)
            tokens = shards.tokens(torch.arange(shards.count(length)))
            assert bool((tokens.diff() > 0).all()) and bool(shards.owns(tokens).all())
            assert torch.equal(shards.rows(tokens), torch.arange(len(tokens)))
            assert torch.equal(shards.count(torch.tensor(LENGTHS)), torch.tensor([shards.count(n) for n in LENGTHS]))
            held.append(tokens)
        assert torch.equal(torch.cat(held).sort().values, torch.arange(length))


def test_stretches_of_tokens_are_stretches_of_rows():
    shards = Shards(1, 3)
    lo, hi = torch.tensor([0, 70, 64, 128, 300, 5]), torch.tensor([400, 80, 127, 191, 299, 3])
    first, last = shards.ranges(lo, hi)
    for i in range(len(lo)):
        wanted = [t for t in range(int(lo[i]), int(hi[i]) + 1) if t // PAGE % 3 == 1]
        assert shards.tokens(torch.arange(int(first[i]), int(last[i]) + 1)).tolist() == wanted


def test_pages_are_dealt_out_whole():
    assert Shards(1, 2).pages(5 * PAGE + 1).tolist() == [1, 3, 5]
    assert Shards(0, 2, 2 * PAGE).pages(5 * PAGE + 1).tolist() == [0, 1, 4, 5]


def test_rows_are_rotated_to_the_positions_of_their_tokens():
    rotary, shards = Rotary(torch.tensor([1.0, 0.1])), Shards(1, 3)
    x = torch.randn(2, 100, 4)
    tokens = shards.tokens(torch.arange(30, 130))
    assert torch.equal(ShardRotary(rotary, shards).range(x, 30), rotary(x, tokens))
