"""Attention to keys side by side: each version against plain softmax, what is hidden, scores far from the reference."""

import pytest
import torch

from longspan.kernels import block_attention as blocks
from longspan.kernels import causal_attention as causal
from longspan.kernels.side_by_side import side_by_side

BF16 = dict(atol=1.6e-2, rtol=1.6e-2)
"""What two roundings of weights and one of outputs allow."""


def inputs(queries, keys, group, kv_heads=2, dim=16, value_dim=24, batch=1, peaked=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    sizes = ((kv_heads * group, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    q, k, v = (torch.randn(batch, *size, generator=gen) for size in sizes)
    # Queries are such as bfloat16 holds exactly: what they lose by it is no error of the attention.
    return (peaked * q).bfloat16().float(), k.bfloat16(), v.bfloat16()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("group,queries,keys", [(1, 1, 1), (1, 63, 64), (3, 40, 40), (3, 33, 301), (16, 7, 513)])
@pytest.mark.parametrize("peaked", [1.0, 40.0], ids=["flat", "peaked"])
def test_causal_attention_equals_the_reference(group, queries, keys, peaked, threads):
    q, k, v = inputs(queries, keys, group, batch=2, peaked=peaked)
    with torch.inference_mode():
        wanted = causal.reference.causal_attention(q, k, v, scale=0.25)
        torch.testing.assert_close(causal.cpu.causal_attention(q, k, v, scale=0.25), wanted, **BF16)
        torch.testing.assert_close(causal.causal_attention(q, k, v, scale=0.25), wanted, **BF16)
    exact = causal.causal_attention(q.double(), k.double(), v.double(), scale=0.25)
    expected = causal.reference.causal_attention(q.double(), k.double(), v.double(), scale=0.25)
    torch.testing.assert_close(exact, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("version", [causal.cpu.causal_attention, causal.causal_attention])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_future_never_reaches_an_output(version, bad):
    q, k, v = inputs(48, 100, 3)
    with torch.inference_mode():
        clean = version(q, k, v, scale=0.25)
        for broken in (k.clone(), v.clone()):
            broken[:, :, 80:] = bad
            given = (broken, v) if broken.shape == k.shape else (k, broken)
            out = version(q, *given, scale=0.25)
            torch.testing.assert_close(out[:, :, :28], clean[:, :, :28], **BF16)
        v[:, :, 80] = float("nan")
        out = version(q, k, v, scale=0.25)
        assert out[:, :, 28:].isnan().all() and not out[:, :, :28].isnan().any()


def test_scores_far_above_those_of_the_first_and_last_keys_are_as_exact():
    """One product would round the weights of two keys that score 200 to the same number."""
    q, k, v = inputs(32, 400, 1, kv_heads=1)
    q[:], k[:] = 0.0, 0.0
    q[..., 0], q[..., 1] = 200.0, 1.0
    k[..., 100:102, 0] = 1.0
    k[..., 101, 1] = 0.5
    with torch.inference_mode():
        out = causal.cpu.causal_attention(q, k, v, scale=1.0)
    share = torch.tensor(0.5).sigmoid()
    wanted = (1 - share) * v[:, :, 100:101].float() + share * v[:, :, 101:102].float()
    torch.testing.assert_close(out, wanted.expand_as(out), **BF16)


def choices(heads, rows, past, first, seed=1):
    """Which blocks each row reads, some of them none; True only before its own."""
    picked = torch.rand(1, heads, rows, past, generator=torch.Generator().manual_seed(seed)) < 0.5
    picked[:, 0, 0] = False
    return picked & (torch.arange(past) < first + torch.arange(rows).unsqueeze(1))


@pytest.mark.parametrize("group,rows,first", [(1, 1, 0), (3, 2, 5), (16, 1, 3), (2, 3, 0)])
def test_block_attention_equals_the_reference(group, rows, first, threads):
    block = 32
    q, k, v = inputs(rows * block, (first + rows) * block, group)
    chosen = choices(2 * group, rows, first + rows - 1, first)
    with torch.inference_mode():
        wanted = blocks.reference.block_attention(q, k, v, chosen, scale=0.25)
        for version in (blocks.cpu.block_attention, blocks.block_attention):
            torch.testing.assert_close(version(q, k, v, chosen, scale=0.25), wanted, **BF16)
    wide = blocks.gathered.block_attention(q.double(), k.double(), v.double(), chosen, scale=0.25)
    expected = blocks.reference.block_attention(q.double(), k.double(), v.double(), chosen, scale=0.25)
    torch.testing.assert_close(wide, expected, atol=1e-12, rtol=1e-12)


def test_blocks_that_were_not_chosen_never_reach_an_output():
    q, k, v = inputs(64, 320, 2, kv_heads=1)
    chosen = torch.zeros(1, 2, 2, 9, dtype=torch.bool)
    chosen[..., 4] = True
    with torch.inference_mode():
        clean = blocks.block_attention(q, k, v, chosen, scale=0.25)
        for broken in (k.clone(), v.clone()):
            broken[:, :, :128] = float("nan")  # the first keys too, which references are taken from
            given = (broken, v) if broken.shape == k.shape else (k, broken)
            torch.testing.assert_close(blocks.cpu.block_attention(q, *given, chosen, scale=0.25), clean, **BF16)


def test_pieces_side_by_side_are_all_worked_on_and_errors_arrive(threads):
    seen = []
    side_by_side(lambda a, b: seen.append((a, b, torch.get_num_threads())), range(50), "ab" * 25)
    assert sorted(piece[:2] for piece in seen) == [(i, "ab"[i % 2]) for i in range(50)]
    assert {piece[2] for piece in seen} == {1}, "each piece has one thread"
    assert torch.get_num_threads() == threads, "the caller's setting stays"
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda a: 1 // a, [1, 0, 1])
