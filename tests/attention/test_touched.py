"""What a decode step really touches, counted in the layer that it reads, from 4K to 4M keys."""

import pytest
import torch
from counting import CountingKV, slope

from longspan.attention import make
from longspan.attention.base import Shape
from longspan.errors import UsageError

LENGTHS = [2**e + 37 for e in range(12, 23, 2)]


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
