"""Blocks cover every pair of a query and a key before it once, and nothing else."""

import pytest
import torch

from longspan.distributed.blocks import blocks
from longspan.distributed.layout import contiguous, interleaved, zigzag


def seen(queries, keys):
    """How often each pair of global positions is computed, over all ranks and passes."""
    count = torch.zeros(keys.stop, keys.stop, dtype=torch.int64)
    for rank in range(queries.ranks):
        for source in range(keys.ranks):
            rows, columns = queries.positions(rank), keys.positions(source)
            for block in blocks(queries, rank, keys, source):
                q, k = rows[slice(*block.queries)], columns[slice(*block.keys)]
                assert len(q) and len(k) and (not block.causal or len(q) == len(k))
                inside = torch.ones(len(q), len(k), dtype=torch.int64)
                count[q.unsqueeze(1), k] += inside.tril() if block.causal else inside
    return count


CASES = {
    "zigzag": lambda n, p: (zigzag(n, p), zigzag(n, p)),
    "contiguous": lambda n, p: (contiguous(n, p), contiguous(n, p)),
    "other orders": lambda n, p: (zigzag(n, p), interleaved(n, p, block=4)),
    "a chunk": lambda n, p: (zigzag(n - n // 3, p, n // 3), zigzag(n // 3, p) + zigzag(n - n // 3, p, n // 3)),
    "a chunk over pages": lambda n, p: (zigzag(n - n // 3, p, n // 3), interleaved(n, p, block=8)),
    "one token": lambda n, p: (zigzag(1, p, n - 1), zigzag(n - 1, p) + zigzag(1, p, n - 1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 16, 33, 64])
def test_every_pair_once(case, ranks, length):
    queries, keys = CASES[case](length, ranks)
    wanted = torch.zeros(length, length, dtype=torch.int64)
    wanted[queries.first :] = torch.ones(length, length, dtype=torch.int64).tril()[queries.first :]
    assert torch.equal(seen(queries, keys), wanted)


def test_zigzag_is_one_block_a_pass_and_balanced():
    layout = zigzag(800, 4)
    for rank in range(4):
        found = [blocks(layout, rank, layout, source) for source in range(4)]
        assert [len(each) for each in found] == [1, 1, 1, 1]
        assert sum(each[0].pairs for each in found) == pytest.approx(801 * 800 / 2 / 4, rel=0.001)


def test_a_chunk_is_one_block_more_on_its_own_and_later_ranks():
    past, chunk = zigzag(800, 4), zigzag(80, 4, 800)
    found = [blocks(chunk, 2, past + chunk, source) for source in range(4)]
    assert [len(each) for each in found] == [1, 1, 2, 2]
    assert [block.causal for block in found[2]] == [False, True]
