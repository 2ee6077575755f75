"""Intervals: against a bootstrap written out plainly, against what is known exactly, and by how often they hold."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.evals.questions.scoring import wilson
from longspan.evals.statistics import Interval, averaged, interval, shared


def every_mean(values):
    """The means of all draws with replacement: what drawing at random approaches."""
    return sorted(sum(draw) / len(values) for draw in itertools.product(values, repeat=len(values)))


@pytest.mark.parametrize("values", [[0.0, 1.0, 1.0, 0.25, 0.5], [0.1, 0.2, 0.9, 0.4], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
def test_ends_are_percentiles_of_all_draws(values):
    found, means = interval(values), every_mean(values)
    assert found.mean == pytest.approx(sum(values) / len(values)) and found.count == len(values)
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        # 4,000 draws hit a percentile within four standard errors of its rank.
        slack = 4 * math.sqrt(share * (1 - share) / 4000)
        low, high = (means[min(len(means) - 1, max(0, int(s * len(means))))] for s in (share - slack, share + slack))
        assert low - 1e-12 <= end <= high + 1e-12


def test_the_same_values_in_any_order_give_the_same_interval():
    values = [0.013 * i * i % 1 for i in range(30)]
    first = interval(values)
    assert all(interval(random.Random(i).sample(values, 30)) == first for i in range(5))
    assert interval(values, seed=1) != first


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_values_that_are_all_the_same_have_wilsons_width(count):
    for value in (0.0, 1.0):
        known, found = wilson([value] * count), interval([value] * count)
        assert (found.low, found.high) == (pytest.approx(known.low, abs=1e-12), pytest.approx(known.high, abs=1e-12))
    half = interval([0.5] * count)
    assert 0 < half.low < 0.5 < half.high < 1
    between = interval([0.0] * count, -1.0, 1.0)
    assert between.high == -between.low == pytest.approx(wilson([0.0] * count).high)
    assert interval([0.7] * count, None, None) == Interval(
        pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.7), count
    )


def test_intervals_hold_about_as_often_as_they_say():
    rng = random.Random(0)
    for share in (0.2, 0.5, 0.8):
        held = 0
        for _ in range(200):
            found = interval([float(rng.random() < share) for _ in range(40)])
            held += found.low <= share <= found.high
        assert held >= 178, "89 % and more, where 95 % are meant and 40 questions are few"


def test_many_values_are_drawn_in_parts():
    rng = random.Random(1)
    values = [float(rng.random() < 0.3) for _ in range(20_000)]
    found = interval(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 20_000)
    assert found.high - found.mean == pytest.approx(half, rel=0.1) == found.mean - found.low


def test_an_average_counts_each_part_once():
    parts = [interval([1.0] * 9 + [0.0]), interval([0.0, 1.0])]
    found = averaged(parts)
    assert found.mean == pytest.approx(0.7) and found.count == 12
    assert averaged(parts[:1]) == parts[0]
    assert 0.7 - found.low < sum(part.mean - part.low for part in parts) / 2, "ends do not all lie on one side at once"


def test_parts_that_share_their_questions_are_drawn_together():
    values = {i: float(i % 3 == 0) for i in range(30)}
    alone, same = interval(list(values.values())), shared([values] * 4)
    assert (same.mean, same.low, same.high) == (alone.mean, alone.low, alone.high) and same.count == 120
    apart = averaged([alone] * 4)
    assert apart.high - apart.low < (same.high - same.low) / 1.8, "what adding squares would promise"
    opposite = shared([values, {i: 1 - value for i, value in values.items()}])
    assert opposite.mean == 0.5 and opposite.high < 0.6, "what evens out within each question leaves Wilson's width"
    assert shared([values, {0: 1.0, 99: 0.0}]) == Interval(1.0, shared([{0: 1.0}]).low, 1.0, 2)
    assert shared([values, {99: 1.0}]) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=12), min_size=1, max_size=5))
def test_intervals_stay_within_the_scale_and_hold_the_mean(groups):
    parts = [interval(group) for group in groups]
    for found in [*parts, averaged(parts)]:
        assert -1e-12 <= found.low <= found.mean + 1e-12 and found.mean <= found.high + 1e-12 <= 1 + 2e-12
