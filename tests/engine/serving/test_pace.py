"""Chunks beside answers: as large as a step's time allows, and never so small that a short request waits for long."""

from longspan.engine.serving.pace import LEAST, MOST, SHARE, SOON, Pace


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
