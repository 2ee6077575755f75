"""RULER as a benchmark: parts within a time limit, workers that go on, a mechanism that fails, the committed result."""

import json
import math
import sys
from pathlib import Path

import pytest

from longspan.evals.asking.local import Local
from longspan.evals.asking.rows import answered

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import ruler

SMALL = (
    "--tasks qa_1 --lengths 900 --questions 2 --mechanisms".split()
    + ["streaming quest:who=layer"]
    + "--share-lengths 900 --share-questions 1 --device cpu".split()
)


@pytest.fixture
def given(folder, places, one_thread, tmp_path):
    return ["--out", str(tmp_path / "found"), "--model", str(folder), *SMALL]


def asked_by(*arguments):
    """Do one worker's part; returns the folder's rows."""
    options = ruler._options([*arguments, "--told", "--out found"])
    ruler.work(options)
    return [entry.row for entry in answered(ruler.entries(Path(options.out))).values()]


def test_workers_ask_each_question_once_dense_first(given, capsys):
    first = asked_by(*given, "--shard", "1/2")
    assert [row["mechanism"] for row in first] == ["dense", "streaming"]
    both = asked_by(*given, "--shard", "2/2")
    assert sorted((row["mechanism"], row["budget"], row["question"]) for row in both) == [
        ("dense", "", 0), ("dense", "", 1), ("quest:who=layer", "1/4", 0), ("streaming", "1/4", 0),
    ]  # fmt: skip
    assert any("budget=225" in row["attention"] and "who=layer" in row["attention"] for row in both)
    assert asked_by(*given, "--shard", "1/1") == both, "what others asked is not asked again"


def test_a_mechanism_that_fails_is_left_out_and_told(given, monkeypatch, capsys):
    ask = Local.ask

    def failing(asker, *arguments):
        if asker.identity.mechanism == "streaming":
            raise RuntimeError("no kernel\nfor this")
        return ask(asker, *arguments)

    monkeypatch.setattr(Local, "ask", failing)
    found = asked_by(*given, "--shard", "1/1")
    assert {row["mechanism"] for row in found} == {"dense", "quest:who=layer"} and len(found) == 3
    assert "FAILED streaming:" in (err := capsys.readouterr().err) and "RuntimeError: no kernel for this" in err


def test_what_is_nobodys_fault_ends_the_run(given, monkeypatch):
    monkeypatch.setattr(ruler.Journal, "append", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked_by(*given, "--shard", "1/1")


def test_the_time_is_kept_and_dense_takes_a_part_of_it(given, monkeypatch):
    seen = []
    monkeypatch.setattr(ruler, "run", lambda *_, until, **__: seen.append(until) or 0)
    asked_by(*given, "--shard", "1/1", "--minutes", "100")
    assert seen[1] - seen[0] == pytest.approx(0.5 * 6000, abs=1) and len(seen) == 2, "none of these is slow"
    asked_by(*given, "--shard", "1/1")
    assert seen[2:] == [math.inf] * 2


def test_slow_mechanisms_come_last_and_each_in_one_form():
    options = ruler._options(["--out", "x"])
    dense, quick, slow = ruler.parts(options)
    assert dense.specs == ["dense"] and dense.budgets == [] and quick.budgets == slow.budgets == ["1/4"]
    assert slow.specs == ["superlinear:sinks=4,summary=key", "tree:who=head"]
    names = [spec.partition(":")[0] for spec in quick.specs]
    assert len(set(names)) == len(names) > 7 and {"streaming", "quest", "snapkv", "retrieval"} < set(names)
    options = ruler._options(["--out", "x", "--mechanisms", "all", "--slow", ""])
    assert len(ruler.parts(options)[1].specs) > 15 and not ruler.parts(options)[2].specs


def test_the_lead_starts_workers_and_makes_the_result(given, capsys, monkeypatch):
    monkeypatch.setattr(ruler, "_BETWEEN", 0.2)
    monkeypatch.setattr(ruler, "load", lambda *_, **__: None)
    monkeypatch.chdir(Path(ruler.__file__).resolve().parents[1])
    assert ruler.main([*given, "--workers", "1", "--minutes", "4"]) == 0
    err = capsys.readouterr().err
    assert "the others" in err and "ended with" not in err
    assert ruler.main([*given, "--result"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        len(found["rows"]) == 4 and "answer" not in found["rows"][0] and found["command"].count("benchmarks.ruler") == 1
    )
    assert {line["contender"] for line in found["table"]} == {"dense", "streaming at 1/4", "quest:who=layer at 1/4"}


def test_the_tables_are_made_of_the_committed_result(monkeypatch, tmp_path):
    from benchmarks import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.ruler() == tables.ruler_mechanisms() == "No result is committed yet.\n"
    line = {"questions": 3, "low": 0, "high": 60.4, "score": 25}
    lines = [
        {"contender": "dense", "task": "vt", "length": 1024, **line},
        {"contender": "dense", "task": "average", "length": 1024, **line},
        {"contender": "dense", "task": "average", "length": 4096, **line},
        {"contender": "quest at 1/4", "task": "vt", "length": 4096, **line},
        {"contender": "quest at 1/4", "task": "average", "length": 4096, **line},
    ]
    about = {"model": "m", "dtype": "float32", "device": "d", "torch": "2", "command": "c"}
    (tmp_path / "ruler-x.json").write_text(json.dumps({**about, "table": lines}))
    assert "| `vt` | 25.0 (0-60) |  |\n| `average` | 25.0 (0-60) | 25.0 (0-60) |\n" in tables.ruler()
    assert "3 to 3 questions" in tables.ruler() and "| contender | 4K |" in tables.ruler_mechanisms()
    assert "| `quest at 1/4` | 25.0 (0-60) |" in tables.ruler_mechanisms()
