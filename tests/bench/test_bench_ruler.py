"""RULER as a benchmark: parts within a time limit, workers that go on, a mechanism that fails, the committed result."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

from longspan.evals.asking.local import Local
from longspan.evals.asking.rows import answered
from longspan.evals.journal import read

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
    return [entry.row for entry in answered(ruler.entries(options)).values()]


def test_workers_ask_each_question_once_dense_first(given, capsys):
    first = asked_by(*given, "--shard", "1/2")
    assert [row["mechanism"] for row in first] == ["dense", "streaming", "quest:who=layer"]
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


def test_where_memory_holds_one_question_it_is_asked_alone(given, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("device is full")

    monkeypatch.setattr(Local, "ask_all", full)
    found = asked_by(*given, "--shard", "1/1", "--together", "4")
    assert len(found) == 4 and "dense: no memory for 2 questions at once" in capsys.readouterr().err


def test_each_part_has_its_share_of_the_time(given, monkeypatch):
    monkeypatch.setattr(ruler.time, "monotonic", lambda: 1000.0)
    assert ruler.ends(940.0, 600.0, 0) == 940 + 0.4 * 600, "dense"
    assert ruler.ends(940.0, 600.0, 9) == pytest.approx(1000 + 1.5 * 540 / 9)
    assert ruler.ends(940.0, 600.0, 1) == 1540, "the last one ends with the run"
    assert ruler.ends(0.0, 600.0, 3) == 600, "none is left"
    assert ruler.ends(0.0, math.inf, 3) == ruler.ends(0.0, math.inf, 0) == math.inf


def test_mechanisms_come_in_the_order_given_after_dense():
    dense, *others = ruler.parts(ruler._options(["--out", "x"]))
    assert dense.specs == ["dense"] and dense.budgets == [] and dense.given.lengths == [1024, 2048, 4096, 8192]
    assert [part.specs[0] for part in others][:3] == ["quest", "sparq", "snapkv"] and others[-1].specs == ["tree"]
    assert all(part.budgets == ["1/4"] and part.given.lengths == [4096, 8192] for part in others)
    assert len(ruler.parts(ruler._options(["--out", "x", "--mechanisms", "all"]))) > 15


def test_rounds_go_on_with_the_questions_that_were_not_asked(given, capsys):
    small = [*given, "--share-questions", "1,3", "--shard", "1/1"]
    assert [part.given.questions for part in ruler.parts(ruler._options(small))] == [2, 1, 1, 3, 3]
    found = asked_by(*small)
    assert [(row["mechanism"], row["question"]) for row in found] == [
        ("dense", 0), ("dense", 1), ("streaming", 0), ("quest:who=layer", 0),
        ("streaming", 1), ("streaming", 2), ("quest:who=layer", 1), ("quest:who=layer", 2),
    ]  # fmt: skip


def test_a_mechanism_that_failed_is_not_tried_in_the_next_round(given, monkeypatch, capsys):
    monkeypatch.setattr(Local, "ask", lambda *_: 1 / 0)
    assert asked_by(*given, "--share-questions", "1,3", "--shard", "1/1") == []
    told = capsys.readouterr().err
    assert told.count("FAILED streaming:") == told.count("FAILED quest:") == 1


def test_the_lead_starts_workers_and_makes_the_result(given, capsys, monkeypatch):
    monkeypatch.setattr(ruler, "_BETWEEN", 0.2)
    monkeypatch.setattr(ruler, "load", lambda *_, **__: None)
    monkeypatch.chdir(Path(ruler.__file__).resolve().parents[1])
    assert ruler.main([*given, "--workers", "1", "--minutes", "4"]) == 0
    err = capsys.readouterr().err
    assert "streaming" in err and "ended with" not in err
    out = Path(given[1])
    assert [file.name for file in out.iterdir()] == ["ruler.jsonl"] and len(read(out / "ruler.jsonl")) == 4
    shutil.rmtree(f"{out}.workers")
    assert ruler.main([*given, "--result"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        len(found["rows"]) == 4 and "answer" not in found["rows"][0] and found["command"].count("benchmarks.ruler") == 1
    )
    assert {line["contender"] for line in found["table"]} == {"dense", "streaming at 1/4", "quest:who=layer at 1/4"}
    assert ruler.main(["--out", str(out), "--result", "--mechanisms", ""]) == 0
    assert {line["contender"] for line in json.loads(capsys.readouterr().out)["table"]} == {"dense"}


def test_the_tables_are_made_of_the_committed_result(monkeypatch, tmp_path):
    from benchmarks import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert {tables.ruler(), tables.ruler_mechanisms(), tables.ruler_agreement()} == {"No result is committed yet.\n"}
    line = {"questions": 3, "low": 0, "high": 60.4, "score": 25}
    lines = [
        {"contender": "dense", "task": "vt", "length": 1024, **line},
        {"contender": "dense", "task": "average", "length": 1024, **line},
        {"contender": "dense", "task": "average", "length": 4096, **line},
        {"contender": "quest at 1/4", "task": "vt", "length": 4096, **line},
        {"contender": "quest at 1/4", "task": "qa_1", "length": 4096, **line},
        {"contender": "quest at 1/4", "task": "average", "length": 4096, **line},
        {"contender": "h2o at 1/4", "task": "vt", "length": 4096, **line},
        {"contender": "h2o at 1/4", "task": "average", "length": 4096, **line},
    ]
    about = {"model": "m", "dtype": "float32", "device": "d", "torch": "2", "command": "c"}
    (tmp_path / "ruler-x.json").write_text(json.dumps({**about, "table": lines}))
    (tmp_path / "ruler-y.json").write_text(json.dumps({**about, "table": lines[:1]}))
    assert "| `vt` | 25.0 (0-60) |  |\n| `average` | 25.0 (0-60) | 25.0 (0-60) |\n" in tables.ruler()
    assert "3 to 3 questions" in tables.ruler() and "| contender | 4K |" in tables.ruler_mechanisms()
    assert "| `quest at 1/4` | 25.0 (0-60) |" in tables.ruler_mechanisms()
    assert "h2o" not in tables.ruler_mechanisms(), "an average of one task of two is none"
    agreement = {"task": "vt", "length": 2048, "independent": 60.0, "ours": 20.0, "difference": 40.0, "error": 21.37}
    (tmp_path / "agreement-x.json").write_text(json.dumps({**about, "table": [agreement]}))
    assert "| `vt` | 2K | 60.0 | 20.0 | +40.0 | 21.4 |\n\nm, float32" in tables.ruler_agreement()
