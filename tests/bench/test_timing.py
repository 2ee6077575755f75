"""Turns, spreads, and how times grow: checked on numbers that are known beforehand."""

import math

import pytest
import torch

from longspan.bench import scaling, timing


def test_sides_take_turns_until_their_time_is_up():
    order = []

    def side(name, seconds):
        def turn():
            order.append(name)
            return (0.0, seconds)

        return turn

    found = timing.in_turns(
        {"quick": side("quick", 0.1), "slow": side("slow", 0.5), "stuck": side("stuck", 9.0)}, 2, 12
    )
    assert {name: len(turns) for name, turns in found.items()} == {"quick": 12, "slow": 5, "stuck": 1}
    assert order[:5] == ["quick", "slow", "stuck", "quick", "slow"]
    assert found["stuck"] == [(0.0, 9.0)]


def test_a_side_of_a_second_gets_as_many_turns_as_fit_twice_its_time():
    found = timing.in_turns({"side": lambda: (1.0,)}, 2, 60)
    assert len(found["side"]) == 4


@pytest.mark.parametrize(
    "values,wanted", [([3.0], (3, 3, 3)), ([1.0, 2.0], (1.5, 1.25, 1.75)), ([5.0, 1.0, 3.0, 2.0, 4.0], (3, 2, 4))]
)
def test_median_and_quartiles(values, wanted):
    assert timing.spread(values) == wanted


def test_a_call_is_timed_and_peaks_are_those_of_a_machine():
    seconds = timing.timed(lambda: torch.ones(10).sum(), torch.device("cpu"))
    assert 0 < seconds < 60
    found = timing.peaks(torch.device("cpu"), torch.float32)
    assert 1e7 < found.copy_bytes_per_s < 1e13 and 1e8 < found.matmul_flops < 1e15


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_a_power_law_gives_its_exponent(power):
    assert scaling.exponent({n: 3e-6 * n**power for n in (64, 256, 1024, 10_000)}) == pytest.approx(power)


def test_one_length_has_no_exponent():
    assert scaling.exponent({64: 1.0}) is None and scaling.exponent({}) is None


def test_the_crossover_of_two_power_laws_is_where_they_meet():
    lengths = [1 << i for i in range(10, 24, 2)]
    ours = {n: 50e-6 * math.sqrt(n) for n in lengths}
    theirs = {n: 1e-7 * n for n in lengths}
    # 50e-6 sqrt(n) = 1e-7 n at n = 500^2.
    assert scaling.crossover(ours, theirs) == {"length": pytest.approx(250_000, rel=1e-4)}
    assert scaling.crossover(theirs, ours) == {"length": None, "faster": "never"}
    assert scaling.crossover(dict.fromkeys(lengths, 1.0), dict.fromkeys(lengths[2:], 2.0)) == {
        "length": None,
        "faster": "always",
    }
    assert scaling.crossover({1: 1.0}, {2: 1.0}) is None


def test_of_two_crossings_the_last_counts():
    ours = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    assert scaling.crossover(ours, {1: 2.0, 2: 0.5, 4: 2.0, 8: 4.0}) == {"length": 3}
