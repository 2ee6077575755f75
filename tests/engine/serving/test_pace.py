"""Chunks beside answers: as large as a step's time allows, and never so small that a short request waits for long."""

import random

from longspan.engine.serving.pace import LEAST, MOST, SHARE, SOON, Crowd, Pace


def read(pace: Pace, seconds_a_token: float, rounds: int = 40) -> int:
    for _ in range(rounds):
        tokens = pace.most()
        pace.read(tokens, tokens * seconds_a_token)
    return pace.most()


def test_nobody_answered_is_no_limit() -> None:
    assert Pace().most() == Pace().most(short=True) == MOST


def test_a_chunk_takes_about_as_long_as_a_step() -> None:
    pace = Pace()
    pace.answering = True
    pace.stepped(0.1)
    for cost in (0.001, 0.0001, 0.002):
        tokens = read(pace, cost)
        assert SHARE * 0.1 / 4 < tokens * cost <= SHARE * 0.1


def test_where_every_chunk_takes_too_long_they_are_small_but_not_a_short_request_s() -> None:
    pace = Pace(0.01)
    pace.answering = True
    assert read(pace, 1.0) == LEAST
    assert pace.most(short=True) == SOON > LEAST


def test_as_many_are_answered_at_once_as_come_in_time_on_average() -> None:
    """A step takes a millisecond for each answer, and now and then much more; whoever comes waits for room."""
    draw, crowd, waited, seen = random.Random(0), Crowd(0.010, 32), [], []
    for step in range(20_000):
        answers = int(crowd.count)
        seconds = 0.001 * answers + (0.020 if draw.random() < 0.05 else 0.0)
        crowd.stepped(seconds, answers)
        if step >= 2_000:
            waited.append(seconds)
            seen.append(answers)
    assert 0.009 < sum(waited) / len(waited) < 0.011 and 8 <= sum(seen) / len(seen) <= 10


def test_few_answers_do_not_show_that_many_would_be_in_time() -> None:
    crowd = Crowd(0.010, 32)
    for _ in range(1000):
        crowd.stepped(0.001, 2)
    assert crowd.fits(2, 2) and not crowd.fits(2, 3)
    crowd.stepped(1.0, 2)
    assert crowd.fits(0, 1) and not crowd.fits(2, 1), "one alone always is"
    assert Crowd(None, 32).fits(16, 16) and not Crowd(None, 32).fits(16, 17)
