"""The progress line: counts, a score for each line of the table, and the time that the rest takes at this pace."""

import pytest

from longspan.evals.progress import Progress, duration


def test_reading_and_asking_are_timed_apart():
    told = []
    progress = Progress(questions=6, tokens=3000, say=told.append)
    progress.before("a", True)
    progress.read(1000, 100.0)
    progress.asked("a", False, 10.0)
    progress.asked("b", True, 30.0)
    progress.read(1000, 500.0)
    progress.asked("b", True, 20.0)
    assert told == [
        "[2/6] a: 1/2 right, about 4 min left",  # 4 questions of 10 s, 2000 tokens of 0.1 s
        "[3/6] b: 1/1 right, about 4 min left",  # 3 of 20 s, the same to read
        "[4/6] b: 2/2 right, about 6 min left",  # 2 of 20 s, 1000 tokens of 0.3 s
    ]


@pytest.mark.parametrize(
    "seconds, words", [(0, "0 s"), (0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1.5 h")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
