"""`longspan eval facts`: the needle eval of sessions as a command, with the same options and results as its module."""

import json
from pathlib import Path

import pytest

from longspan.evals import needle

SMALL = ("--lengths", "400", "--kinds", "twofact", "--haystacks", "1", "--mechanisms", "streaming:window=64")


def rows_of(result):
    return [{key: value for key, value in row.items() if key not in ("first_token_s", "run")} for row in result["rows"]]


def test_the_command_and_the_module_measure_the_same(cli, home: Path, capfdbinary):
    code, out, err = cli("eval", "facts", *SMALL, "--dtype", "float32", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["command"].startswith("longspan eval facts") and found["dtype"] == "float32"
    assert len(found["rows"]) == 4 and "[4/4] streaming:window=64 twofact 400: " in err
    assert needle.main([*SMALL, "--dtype", "float32", "--json"]) == 0
    module = json.loads(capfdbinary.readouterr().out)
    assert rows_of(found) == rows_of(module) and found["table"] == module["table"]
    assert module["command"].startswith("python -m longspan.evals.needle --lengths 400")


def test_a_stopped_run_goes_on_and_files_are_merged(cli, home: Path):
    code, out, err = cli("eval", "facts", *SMALL, "--out", "rows.jsonl", "--minutes", "1e-9")
    assert code == 0 and "3 of 4 questions left: the same command goes on from rows.jsonl" in err
    assert cli("eval", "facts", *SMALL, "--out", "rows.jsonl")[0] == 0
    assert "Facts in a haystack, twofact" in Path("rows-report/report.html").read_text()
    code, out, err = cli("eval", "facts", "--merge", "rows.jsonl")
    assert (code, err) == (0, "")
    assert "own words" in out and "streaming:window=64" in out and len(Path("rows.jsonl").read_text().splitlines()) == 6
    code, out, _ = cli("eval", "facts", "--merge", "rows.jsonl", "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 4


def test_ctrl_c_keeps_every_answer(cli, home: Path, monkeypatch):
    from longspan.engine.llm import LLM

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "ask", stop)
    code, out, err = cli("eval", "facts", *SMALL, "--out", "rows.jsonl")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "longspan: stopped: the same command goes on from rows.jsonl"


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--lengths", "4X"], "'4X' is no length"),
        (["--kinds", "double"], "unknown kind 'double'"),
        (["--mechanisms", "quadratic"], "unknown attention 'quadratic'"),
        (["--haystacks", "0"], "--haystacks 0"),
        (["--haystacks", "few"], "(see: longspan eval facts --help)"),
        (["--minutes", "0"], "--minutes 0"),
        (["--dtype", "int8"], "use one of float32, bfloat16, float16"),
        (["--device", "abacus"], "use auto, cpu or cuda"),
        (["--out", "none/rows.jsonl"], "can't write none/rows.jsonl"),
        (["--merge"], "--merge needs files"),
        (["--merge", "gone.jsonl"], "can't read gone.jsonl"),
        (["--merge", "minutes.txt"], "no journal of an eval"),
        (["--merge", "gone.jsonl", "--out", "rows.jsonl"], "--merge asks nothing"),
        (["gone.jsonl"], "files are for --merge alone"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_bad_arguments_get_one_line(cli, home: Path, arguments, told):
    code, out, err = cli("eval", "facts", *arguments)
    assert (code, out) == (2, "")
    assert told in err and err.startswith("longspan: ") and len(err.splitlines()) == 1
