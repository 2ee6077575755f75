"""A Mamba-2 layer over ranks gives the outputs and states of one rank that reads all tokens."""

import pytest
import torch

from longspan.distributed.layout import contiguous
from longspan.hf.native.blocks import Mamba, Norm, Run
from longspan.hf.native.handing import Split

HEADS, DIM, GROUPS, STATE, WIDTH, HIDDEN = 4, 8, 2, 6, 4, 10


def layer():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inner, channels = HEADS * DIM, HEADS * DIM + 2 * GROUPS * STATE
    return Mamba(
        3, drawn(inner + channels + HEADS, HIDDEN), drawn(channels, WIDTH), drawn(channels), -drawn(HEADS).exp(),
        drawn(HEADS), drawn(HEADS), Norm(drawn(inner), 1e-5), drawn(HIDDEN, inner), HEADS, DIM, GROUPS, STATE,
    )  # fmt: skip


def read(group, lengths):
    """This rank's outputs of chunk after chunk, and the states behind each, the same on all ranks."""
    mamba, found, state = layer(), [], {}
    for number, length in enumerate(lengths):
        x = torch.randn(length, HIDDEN, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        parts = contiguous(length, group.size)
        split = None if group.size == 1 else Split(group, parts.counts)
        run = Run(None, state, split=split)
        found.append((mamba.read(parts.shard(x, group.rank, 0), run), dict(run.after)))
        state = run.after
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_states_are_handed_along(ranks, size):
    lengths = [101, 16, 203]
    (wanted,) = ranks.run(read, lengths, size=1)
    found = ranks.run(read, lengths, size=size)
    for number, (out, states) in enumerate(wanted):
        parts = torch.cat([each[number][0] for each in found])
        assert (parts - out).abs().max() < 1e-10 * out.abs().max()
        for name, state in states.items():
            mine = [each[number][1][name] for each in found]
            assert all(torch.equal(one, mine[0]) for one in mine), "the same bits on every rank"
            # A convolution looks back over three inputs; the first column of its four is never read.
            kept = slice(1, None) if "conv" in name else slice(None)
            assert (mine[0] - state)[..., kept].abs().max() < 1e-12 * state.abs().max()


def test_what_came_before_matters(ranks):
    """Read from empty states, parts give something else: the test above tells."""
    (wanted,) = ranks.run(read, [101], size=1)
    x = torch.randn(101, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = layer().read(x[51:], Run(None, {}))
    assert (apart - wanted[0][0][51:]).abs().max() > 0.1
