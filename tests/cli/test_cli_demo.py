"""`longspan demo`, on a short text and with the tiny model: what it does and how it judges itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.cli import demo
from longspan.cli.output import excerpt, size
from longspan.cli.progress import _clock


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path, calibrated: Path) -> None:
    monkeypatch.setattr(demo, "reference", lambda: "The assert statement raises AssertionError. Loops end. " * 20)
    # A cache of its own to write into, with the calibrations of the shared one.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "heads").symlink_to(calibrated / "heads")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "own"))


def test_wrong_answers_are_told_and_the_session_is_there(cli, short: None, home: Path) -> None:
    code, out, err = cli("demo")
    assert code == 1, err  # random weights answer nothing
    for question, _ in demo.QUESTIONS:
        assert f"Question: {question}" in out
    assert f"Answer 1 is wrong: it should contain {demo.QUESTIONS[0][1]!r}." in out
    assert "reading included" in out
    assert "--session demo" in out
    text = (home / "own" / "demo" / "python-language-reference.txt").read_text()
    assert text == demo.reference()
    code, out, _ = cli("ask", "What ends?", "--session", "demo", "--max-tokens", "3", "--json")
    assert code == 0
    assert json.loads(out)["cached_tokens"] > 100


def test_json_and_a_fresh_start_each_time(cli, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # An empty word is in every text: then all is right.
    monkeypatch.setattr(demo, "QUESTIONS", (("What does assert raise?", ""), ("What ends?", "")))
    for _ in range(2):
        code, out, err = cli("demo", "--json")
        assert code == 0, err
        assert "longspan: read " in err
        told = json.loads(out)
        assert told["right"] is True
        assert told["tokens"] > 100
        assert told["prefill_tokens_per_s"] > 0
        assert [each["expected"] for each in told["questions"]] == ["", ""]
        assert all(each["citations"] for each in told["questions"])


def test_what_can_not_be_saved_is_told_before_reading(cli, short: None, home: Path) -> None:
    (home / "sessions").write_text("a file where the folder should be")
    code, _, err = cli("demo")
    assert code == 1
    assert "can't save session 'demo'" in err
    assert "reading" not in err


def test_the_reference_is_that_of_this_python() -> None:
    text = demo.reference()
    assert text.startswith("assert\n")
    assert all(word in text for _, word in demo.QUESTIONS)
    assert len(text) > 400_000
    assert len(demo.QUESTIONS) == 2


def test_excerpts_stand_where_the_words_are() -> None:
    text = "nothing here. " * 100 + "The wombat sleeps by day. " + "nothing there. " * 100
    assert "wombat sleeps" in excerpt(text, "When does the wombat sleep?", 100)
    assert len(excerpt(text, "wombat", 100)) < 110
    assert excerpt("short\n text", "x", 100) == "short text"
    assert excerpt("a" * 500, "x", 100).startswith("aaa")


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (98_000_000, "98 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes(count: float, told: str) -> None:
    assert size(count) == told


@pytest.mark.parametrize(("seconds", "told"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (8000, "2 h 13 min")])
def test_durations(seconds: float, told: str) -> None:
    assert _clock(seconds) == told
