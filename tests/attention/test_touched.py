"""What a decode step really touches, counted in the layer that it reads, from 4K to 4M keys."""

import pytest
import torch
from counting import CountingKV, Operators, slope

from longspan.attention import make
from longspan.attention.base import Shape
from longspan.errors import UsageError
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

LENGTHS = [2**e + 37 for e in range(12, 23, 2)]
DIM, HEADS = 8, 2


@torch.inference_mode()
def operators_of_a_step(mechanism, n, drops=False):
    """Numbers that operators read and write in one decode step over pages, once the step before has been taken."""
    gen, shape = torch.Generator().manual_seed(15), (1, HEADS, n, DIM)
    kv = PagedKV(PagePool(HEADS, DIM, DIM, torch.float32, torch.device("cpu")), Rotary(0.1 ** torch.arange(DIM // 2)))
    kv.append(torch.randn(shape, generator=gen), torch.randn(shape, generator=gen))
    kv.commit()
    if drops:
        kv.drop(*mechanism.dropped(n))
    for _ in range(3):
        one = torch.randn(2, 1, HEADS, 1, DIM, generator=gen)
        with Operators() as counted:
            if not kv.append_within(*one):
                kv.append(*one)
            mechanism.attend(torch.randn(1, 3 * HEADS, 1, DIM, generator=gen), kv)
    return counted.numbers


@pytest.mark.parametrize("drops", [False, True])
def test_a_decode_step_of_streaming_takes_as_much_at_any_length(drops):
    mechanism = make("streaming", window=1000)
    counts = [operators_of_a_step(mechanism, n, drops) for n in (4101, 16_389, 65_541)]
    assert len(set(counts)) == 1
    # Keys and values of the window are read once: nothing is made of each key, such as its rotation.
    assert 2 * 1000 * HEADS * DIM < counts[0] < 2.5 * 1000 * HEADS * DIM


def test_operators_of_a_decode_step_grow_as_the_mechanism_says():
    lengths = [16_389, 65_541, 262_149]
    spans = [operators_of_a_step(make("superlinear", window=500, sinks=4), n) for n in lengths]
    assert slope(lengths, spans) <= 0.5
    # A block of 16 has two bounds of each channel, widened (unless they are so already) and multiplied.
    blocks = [operators_of_a_step(make("quest", dense_layers=0), n) for n in lengths]
    a_key = (blocks[2] - blocks[1]) / (lengths[2] - lengths[1])
    assert a_key <= HEADS * (2 * DIM + 40) / 16


@pytest.mark.parametrize("options", [{}, dict(beam=4, leaves=2), dict(open_by="mean"), dict(who="layer")], ids=range(4))
def test_what_a_decode_step_touches_hardly_grows(options):
    mechanism, totals = make("tree", **options), []
    q = torch.randn(1, 3, 1, 8, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for n in LENGTHS:
        kv = CountingKV(n)
        mechanism.attend(q, kv)
        assert kv.touched["keys"] + kv.touched["mean_key"] == mechanism.cost(n, Shape(3, 1, 8, 8)).decode_keys
        totals.append(sum(kv.touched.values()))
    assert 0 < slope(LENGTHS, totals) <= 0.15
    # What is read exactly does not grow at all; the nodes do, with the number of levels.
    assert totals[-1] > totals[0]


@pytest.mark.parametrize("keys", [512, 1024, 2048, 4096])
def test_within_sets_what_a_query_reads(keys):
    for n in (20_000, 1_000_000):
        mechanism = make("tree").within(keys, n)
        kv = CountingKV(n)
        mechanism.attend(torch.ones(1, 1, 1, 8, dtype=torch.float64), kv)
        assert 0.85 * keys <= kv.touched["keys"] + kv.touched["mean_key"] <= keys
        assert mechanism.leaves >= 2 and mechanism.beam >= 2
    made = make("tree").within(keys, keys)
    kv = CountingKV(keys)
    made.attend(torch.ones(1, 1, 1, 8, dtype=torch.float64), kv)
    assert kv.touched["keys"] == keys and "mean_key" not in kv.touched
    with pytest.raises(UsageError, match="allow 512"):
        make("tree").within(90, 1_000_000)


@pytest.mark.parametrize("spans,heads", [(1, 1), (3, 1), (3, 3)])
def test_what_a_decode_step_of_superlinear_touches_grows_as_the_square_root(spans, heads):
    mechanism, totals = make("superlinear", window=200, spans=spans), []
    q = torch.randn(1, heads, 1, 8, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    for n in LENGTHS:
        kv = CountingKV(n)
        mechanism.attend(q, kv)
        totals.append(kv.touched["keys"] - mechanism.whole_window)
        expected = mechanism.cost(n, Shape(heads, 1, 8, 8)).decode_keys - mechanism.whole_window
        # Anchors are read once for the heads of a group; spans are each head's own, and may touch or overlap.
        assert 0.5 * expected <= totals[-1] <= 2 * heads * expected
    assert abs(slope(LENGTHS, totals) - 0.5) <= 0.05


@pytest.mark.parametrize("backward", [2.0, 3.0])
def test_every_past_key_lies_in_some_candidate_span_of_superlinear(backward):
    mechanism = make("superlinear", window=30, backward=backward, forward=0.0)
    for n in [*range(1, 400), 777, 1024, 4095, 10_007, 65_536, 100_003, 1_000_000, 4_194_341]:
        t = n - 1
        uncovered = t - mechanism.whole_window  # the newest key that nothing covers yet
        for anchor in mechanism.anchors(t):  # newest first
            lo, hi = mechanism.span(t, anchor)
            assert hi >= uncovered or uncovered < 0, f"a gap below {uncovered} at n={n}"
            uncovered = min(uncovered, lo - 1)
        assert uncovered < 0, f"keys 0..{uncovered} at n={n}"
