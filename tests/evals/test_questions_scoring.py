"""Scores and their intervals, and how much haystack a length holds."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.evals.questions.fill import Drawn, fill
from longspan.evals.questions.scoring import Interval, averaged, score, wilson


@pytest.mark.parametrize(
    "answer, outputs, every, any_",
    [
        ("They are A1 and B2.", ["a1", "b2"], 1.0, 1.0),
        ("A1", ["a1", "b2"], 0.5, 1.0),
        ("", ["a1", "b2"], 0.0, 0.0),
        ("the 1234567.", ["1234567"], 1.0, 1.0),
        ("two\nlines", ["two lines"], 0.0, 0.0),
        ("tab\there", ["tab\nhere"], 1.0, 1.0),
        ("STRASSE", ["straße", "x", "y"], 1 / 3, 1.0),
    ],
)
def test_all_outputs_count_in_parts_and_any_is_enough_where_one_is_asked_for(answer, outputs, every, any_):
    assert score(answer, outputs, "all") == pytest.approx(every)
    assert score(answer, outputs, "any") == any_


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60))
def test_wilsons_interval_holds_the_shares_that_the_mean_does_not_contradict(scores):
    found, count = wilson(scores), len(scores)
    assert found.mean == pytest.approx(sum(scores) / count)

    def contradicts(share):
        return abs(found.mean - share) > 1.959963984540054 * math.sqrt(share * (1 - share) / count) + 1e-12

    for end, outside, limit in ((found.low, -1e-4, 0.0), (found.high, 1e-4, 1.0)):
        if end != limit:
            assert contradicts(end + outside) and not contradicts(end - outside)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_a_known_interval():
    found = wilson([1.0] * 9 + [0.0])
    assert (found.low, found.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert wilson([0.0] * 5).low == 0 and wilson([1.0] * 5).high == 1 > wilson([1.0] * 5).low


def test_an_average_is_surer_than_its_parts():
    part = wilson([1.0, 0.0, 1.0, 1.0])
    assert averaged([part]) == Interval(pytest.approx(part.mean), pytest.approx(part.low), pytest.approx(part.high))
    four = averaged([part] * 4)
    assert four.mean == pytest.approx(part.mean)
    assert four.mean - four.low == pytest.approx((part.mean - part.low) / 2)
    assert four.high - four.mean == pytest.approx((part.high - part.mean) / 2)
    assert averaged([Interval(0, 0, 0.4), Interval(1, 0.6, 1)]) == Interval(0.5, pytest.approx(0.3), pytest.approx(0.7))


@settings(max_examples=200, deadline=None)
@given(
    pace=st.floats(0.05, 60), bend=st.floats(0, 0.3), base=st.integers(0, 500), limit=st.integers(1, 4000),
    least=st.integers(1, 12),
)  # fmt: skip
def test_as_many_units_as_fit(pace, bend, base, limit, least):
    calls = []

    def tokens(units):
        calls.append(units)
        return base + int(pace * units ** (1 + bend))

    found = fill(tokens, limit, least)
    if tokens(least) > limit:
        assert found is None
    else:
        assert tokens(found) <= limit < tokens(found + 1)
    assert len(calls) < 60


def test_few_texts_are_split_however_long_they_are():
    for limit in (4_000, 100_000, 10_000_000):
        calls = []

        def tokens(units, calls=calls):
            calls.append(units)
            return 300 + int(1.37 * units + units**0.9)

        fill(tokens, limit, 4)
        assert len(calls) < 16


def test_more_begins_as_fewer_did_and_nothing_is_drawn_twice():
    drawn = []
    source = Drawn(drawn.append(i) or i for i in range(7))
    assert source.first(3) == [0, 1, 2] and source.first(2) == [0, 1] and drawn == [0, 1, 2]
    assert source.first(50) == list(range(7)) == drawn
