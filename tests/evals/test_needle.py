"""The needle eval through the real engine: what it asks, what an interrupted run keeps, what files become together."""

import itertools
import json
import sys
from pathlib import Path

import pytest

from longspan.engine.llm import LLM
from longspan.evals import needle
from longspan.evals.journal import read
from tiny_llama import save_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import tables

NARROW, WIDE = "streaming:window=64,sinks=2", "streaming:window=128,sinks=2"
TIMES = ("first_token_s",)


class Spy:
    """Counts what the engine reads and is asked, and stops it like Ctrl-C at the question of that number."""

    def __init__(self, monkeypatch):
        self.questions, self.read, self.stop_at = [], 0, None
        ask, prefill = LLM.ask, LLM.prefill

        def counted(llm, question, *args, **options):
            if self.stop_at is not None and len(self.questions) >= self.stop_at:
                raise KeyboardInterrupt
            self.questions.append(question)
            return ask(llm, question, *args, **options)

        def reading(llm, session, progress=None):
            new = session.memory is None
            self.read += new
            return prefill(llm, session, progress)

        monkeypatch.setattr(LLM, "ask", counted)
        monkeypatch.setattr(LLM, "prefill", reading)

    def counts(self):
        """Return contexts read and questions asked since the last time."""
        found = self.read, len(self.questions)
        self.read, self.questions = 0, []
        return found


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


@pytest.fixture
def call(folder, calibrated, capfd):
    """Runs the eval on two haystacks (two facts a question: 4 questions each); gives exit code, stdout and stderr."""

    def run(*arguments, model=folder):
        capfd.readouterr()
        given = ["--model", str(model), "--device", "cpu", "--dtype", "float32", "--mechanisms", NARROW]
        given += ["--lengths", "1K", "--kinds", "twofact", "--haystacks", "2"]
        code = needle.main([*given, *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def file(tmp_path):
    return tmp_path / "needle.jsonl"


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in (*TIMES, "run")} for row in rows]


def rows_of(file):
    return [entry.row for entry in read(file)]


def questions_of(rows):
    return [(row["mechanism"], row["kind"], row["requested"], row["haystack"], row["question"]) for row in rows]


def test_a_row_says_all_that_its_question_was(call, file, spy, tiny):
    code, out, err = call("--out", file, "--json", "--seed", 5)
    assert code == 0, err
    assert spy.counts() == (2, 8)
    result = json.loads(out)
    rows = rows_of(file)
    assert questions_of(rows) == [(NARROW, "twofact", 1024, seed, i) for seed in (5, 6) for i in range(4)]
    for row in rows:
        assert (row["spec"], row["fingerprint"], row["dtype"]) == (NARROW, tiny.fingerprint, "float32")
        assert abs(row["length"] - 1024) < 64 and 0 < row["depth"] < 1 and row["attention"] == NARROW
        assert row["wanted"].count(" / ") == 1
    first = json.loads(file.read_text().splitlines()[0])["environment"]
    assert result["runs"] == [first]
    assert [result[key] for key in ("device", "torch", "command", "model")] == [
        first[key] for key in ("device", "torch", "command", "model")
    ]
    assert f"--out {file}" in result["command"]
    assert result["rows"] == [{**row, "run": 0} for row in rows]
    assert [(line["mechanism"], line["length"], line["questions"]) for line in result["table"]] == [(NARROW, "1K", 8)]
    told = err.splitlines()
    assert len(told) == 8
    right = sum(row["right"] for row in rows[:4])
    assert told[3].startswith(f"[4/8] {NARROW} twofact 1024: {right}/4 right, about ")


@pytest.mark.parametrize(
    "lines, part, reads, asks",
    [
        pytest.param(0, 30, 2, 8, id="in the environment"),
        pytest.param(3, 50, 2, 6, id="in a haystack"),
        pytest.param(5, -2, 1, 4, id="after a haystack"),
        pytest.param(8, 1, 1, 1, id="at the last question"),
    ],
)
def test_a_run_that_was_killed_in_a_line_goes_on(call, file, spy, lines, part, reads, asks):
    assert call("--out", file)[0] == 0
    full, written = rows_of(file), file.read_bytes().splitlines(keepends=True)
    spy.counts()
    file.write_bytes(b"".join(written[:lines]) + written[lines][:part])
    code, out, err = call("--out", file, "--json")
    assert code == 0, err
    assert spy.counts() == (reads, asks), "what was answered is neither read nor asked again"
    assert without_times(rows_of(file)) == without_times(full)
    result = json.loads(out)
    assert without_times(result["rows"]) == without_times(full)
    assert [line["questions"] for line in result["table"]] == [8]
    assert [line.split("]")[0] for line in err.splitlines()] == [f"[{i}/8" for i in range(9 - asks, 9)]


def test_ctrl_c_keeps_every_answer(call, file, spy):
    spy.stop_at = 5
    code, out, err = call("--out", file)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == f"needle: stopped: the same command goes on from {file}"
    assert len(rows_of(file)) == 5
    spy.stop_at = None
    spy.counts()
    assert call("--out", file)[0] == 0
    assert spy.counts() == (1, 3)
    rows = rows_of(file)
    assert len(set(questions_of(rows))) == len(rows) == 8
    spy.stop_at = 2
    code, out, err = call()
    assert (code, out) == (130, "")
    assert "nothing is kept without --out" in err.splitlines()[-1]


def test_what_is_answered_is_not_read_again(call, file, spy):
    assert call("--out", file)[0] == 0
    spy.counts()
    before = file.read_bytes()
    first = call("--out", file, "--json")
    assert first[0] == 0 and first[2] == ""
    assert spy.counts() == (0, 0)
    assert file.read_bytes() == before
    assert len(json.loads(first[1])["rows"]) == 8
    # Another question is one that differs in anything at all.
    code, out, _ = call("--out", file, "--json", "--seed", 1, "--mechanisms", f"{NARROW}; {WIDE}")
    assert code == 0
    assert spy.counts() == (3, 12)
    assert [(line["mechanism"], line["questions"]) for line in json.loads(out)["table"]] == [(NARROW, 8), (WIDE, 8)]
    assert len(rows_of(file)) == 20
    assert [
        json.loads(line)["environment"]["command"].count("--seed 1") for line in file.open() if "environ" in line
    ] == [
        0,
        1,
    ], "a line for each start that measured"


def test_rows_tell_specifications_apart(call, file, spy):
    wanted = f"{NARROW} streaming:sinks=2,window=64 {WIDE} auto {NARROW}"
    code, out, _ = call("--mechanisms", wanted, "--haystacks", 1, "--json")
    assert code == 0
    assert spy.counts() == (3, 12), "two that mean the same are asked once"
    result = json.loads(out)
    assert [(line["mechanism"], line["questions"]) for line in result["table"]] == [(NARROW, 4), (WIDE, 4), ("auto", 4)]
    assert {(row["mechanism"], row["attention"]) for row in result["rows"]} == {
        (NARROW, NARROW),
        (WIDE, WIDE),
        ("auto", "retrieval"),  # the haystack is as long as the window
    }


def test_another_type_is_another_question(call, file, spy):
    assert call("--out", file, "--haystacks", 1)[0] == 0
    code, out, _ = call("--out", file, "--haystacks", 1, "--dtype", "bfloat16", "--json")
    assert code == 0
    assert spy.counts() == (2, 8)
    result = json.loads(out)
    assert result["dtype"] == "bfloat16" and {row["dtype"] for row in result["rows"]} == {"bfloat16"}
    assert [row["dtype"] for row in rows_of(file)] == ["float32"] * 4 + ["bfloat16"] * 4
    code, out, err = call("--merge", file)
    assert (code, out) == (2, "") and "several models or types" in err


def test_a_time_limit_ends_after_a_question(call, file, spy):
    """However short the limit, each start answers something, so that starts enough answer everything."""
    for done in range(1, 8):
        code, out, err = call("--out", file, "--minutes", "1e-9", "--json")
        assert code == 0
        assert spy.counts() == (1, 1)
        assert len(json.loads(out)["rows"]) == len(rows_of(file)) == done
        assert err.splitlines()[-1].endswith(
            f"with {8 - done} of 8 questions left: the same command goes on from {file}"
        )
    code, out, err = call("--out", file, "--minutes", "60", "--json")
    assert code == 0 and "left:" not in err
    assert len(set(questions_of(rows_of(file)))) == len(rows_of(file)) == 8


def test_merged_files_are_one_result(call, tmp_path, monkeypatch):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert call("--out", first, "--minutes", "1e-9")[0] == 0
    assert call("--out", first, "--haystacks", 1)[0] == 0
    assert call("--out", second, "--mechanisms", f"{NARROW} {WIDE}")[0] == 0
    with second.open("ab") as stream:
        stream.write(b'{"mechanism": "stream')
    code, out, err = call("--merge", first, second, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    rows = result["rows"]
    assert len(set(questions_of(rows))) == len(rows) == 16
    assert [(line["mechanism"], line["questions"]) for line in result["table"]] == [(NARROW, 8), (WIDE, 8)]
    assert [line["right"] for line in result["table"]] == [
        sum(row["right"] for row in rows if row["mechanism"] == name) for name in (NARROW, WIDE)
    ]
    assert [row["run"] for row in rows] == [0, 1, 1, 1] + [2] * 12, "the first answer to a question counts"
    assert len(result["runs"]) == 3
    assert result["command"] == "; ".join(run["command"] for run in result["runs"])
    assert all(isinstance(result[key], str) for key in ("device", "python", "torch", "transformers", "longspan"))

    code, lines, _ = call("--merge", first, second)
    assert code == 0 and len(lines.splitlines()) == 2
    (tmp_path / "needle-tiny.json").write_text(out, encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert [(line["mechanism"], line["questions"]) for line in tables._needles()] == [(WIDE, 8), (NARROW, 8)]


def test_answers_of_other_models_and_other_evals_are_not_ours(call, file, spy, tmp_path):
    other = save_model(tmp_path / "other", seed=1, max_position_embeddings=1024)
    assert call("--out", file, "--haystacks", 1)[0] == 0
    assert call("--out", file, "--haystacks", 1, "--minutes", "1e-9", model=other)[0] == 0
    assert spy.counts() == (2, 5)
    row = json.loads(file.read_text().splitlines()[1])
    for strange, arguments in itertools.product(({"score": 1}, {**row, "length": "4K"}), ("--out", "--merge")):
        file.write_text(f'{{"environment": {{}}}}\n{json.dumps(strange)}\n')
        code, out, err = call(arguments, file)
        assert (code, out) == (2, "")
        assert "rows of another eval" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--lengths", "4X"], "'4X' is no length"),
        (["--lengths", ""], "'' is no length"),
        (["--kinds", "single,double"], "unknown kind 'double'"),
        (["--mechanisms", "streaming:windows=3"], "windows"),
        (["--mechanisms", "quadratic"], "quadratic"),
        (["--mechanisms", ";"], "no mechanism"),
        (["--haystacks", "0"], "--haystacks 0"),
        (["--haystacks", "few"], "few"),
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "-1"], "--minutes -1"),
        (["--minutes", "nan"], "--minutes nan"),
        (["--dtype", "int8"], "int8"),
        (["--device", "abacus"], "abacus"),
        (["--out", "."], "can't write"),
        (["--out", "none/rows.jsonl"], "can't write"),
        (["--merge"], "--merge"),
        (["--merge", "gone.jsonl"], "can't read gone.jsonl"),
        (["--merge", "empty.jsonl"], "no answers in empty.jsonl"),
        (["--merge", "empty.jsonl", "--out", "rows.jsonl"], "--merge asks nothing"),
        (["--fast"], "--fast"),
    ],
    ids=" ".join,
)
def test_bad_arguments_get_one_line_before_a_model_is_loaded(call, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    monkeypatch.setattr(needle, "LLM", None)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert told in err and err.startswith("needle: ") and len(err.splitlines()) == 1


def test_a_model_that_is_not_there_gets_one_line(call):
    code, out, err = call(model="nosuchmodel")
    assert (code, out) == (2, "") and "nosuchmodel" in err and len(err.splitlines()) == 1


def test_a_haystack_too_short_for_its_facts_is_refused(call):
    code, out, err = call("--lengths", "100")
    assert (code, out) == (2, "") and "100 tokens do not hold 8 facts" in err
