"""A decode step of superlinear attention, however it is cut into programs and launches, equals its plain version."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from longspan.kernels.held import Held
from longspan.kernels.superlinear import Search, Turn, reference
from longspan.kernels.superlinear.triton_decode import Cut, decode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EARLY = DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
LENGTHS = [4097, 300, 1025] if DEVICE.type == "cuda" else [205, 20]
CUTS = {
    "pieces of their own": Cut(16, 16),
    "the last piece reads the rest": Cut(16, 16, rest=15),
    "one piece": Cut(16, 16, rest=1000),
    "the last program merges": Cut(16, 16, 16, rest=15, last=True, chained=True),
    "blocks on their way": Cut(32, 16, stages=3, last=True),
}


def made(lengths, heads=(4, 2), dim=16, dtype=torch.float32, seed=0):
    """Return queries, pages of keys and of values in any order, and lengths."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-max(lengths) // 64)
    table = torch.randperm(len(lengths) * pages, generator=generator).view(len(lengths), pages).to(DEVICE)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    slots = (heads[1], table.numel(), 64, dim)
    q = normal(len(lengths), heads[0], dim)
    return q, Held(normal(*slots), table), Held(normal(*slots), table), torch.tensor(lengths, device=DEVICE)


@pytest.fixture(autouse=True)
def nan_first(monkeypatch):
    """Memory that a step allocates is NaN first (counts: no piece), so that what it does not write shows."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("gate,share,sinks", [("joint", "head", 3), ("routed", "head", 0), ("routed", "group", 3)])
def test_every_cut_equals_the_plain_version(cut, gate, share, sinks):
    q, k, v, lengths = made(LENGTHS, (2, 1))
    search = Search(24, gate=gate, share=share, sinks=sinks)
    found = decode(q, k, v, lengths, search, scale=0.3, cut=cut, early=EARLY)
    wanted = reference.decode(q, k, v, lengths, search, scale=0.3)
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("gate", ["joint", "routed"])
def test_positions_by_the_last_program(gate):
    q, k, v, lengths = made(LENGTHS, (2, 1))
    turn = Turn(10000.0 ** -(torch.arange(6, device=DEVICE).double() / 6) / (2 * math.pi), LENGTHS[0] - 40)
    search = Search(24, gate=gate, sinks=3)
    given = {"scale": 0.3, "turn": turn}
    found = decode(q, k, v, lengths, search, **given, cut=CUTS["the last program merges"], early=EARLY)
    torch.testing.assert_close(found, reference.decode(q, k, v, lengths, search, **given), atol=5e-6, rtol=5e-6)


def test_a_context_within_the_window_is_merged_by_a_kernel():
    q, k, v, lengths = made([40])
    search = Search(120)
    found = decode(q, k, v, lengths, search, scale=0.3, cut=CUTS["the last program merges"], early=EARLY)
    torch.testing.assert_close(found, reference.decode(q, k, v, lengths, search, scale=0.3), atol=3e-6, rtol=3e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="programs run at the same time on a GPU only")
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_steps_in_a_graph_give_the_same_bits_each_time(last, chained):
    # Hundreds of programs of a sequence finish in any order; what they give together does not hang on it.
    q, k, v, lengths = made([70000, 4097, 65536], (32, 2), 128, torch.bfloat16)
    search = Search(2024, gate="routed")
    cut = Cut(256, 128, rest=64, last=last, chained=chained)
    graph = torch.cuda.CUDAGraph()
    decode(q, k, v, lengths, search, scale=0.1, cut=cut)
    with torch.cuda.graph(graph):
        outs = [decode(q, k, v, lengths, search, scale=0.1, cut=cut) for _ in range(4)]
    wanted = reference.decode(q, k, v, lengths, search, scale=0.1)
    first = None
    for _ in range(100):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        first = outs[0].clone() if first is None else first
        assert all(torch.equal(out, first) for out in outs)
    torch.testing.assert_close(first.float(), wanted, atol=2e-2, rtol=2e-2)
