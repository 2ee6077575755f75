"""The bench of a whole model: what it compares before it times, and what it tells."""

import json

import pytest
import torch

from longspan.bench import model as bench

pytestmark = pytest.mark.usefixtures("one_thread", "places")


@pytest.fixture
def call(folder, calibrated, capfd, monkeypatch):
    """Runs the bench on the tiny model; gives exit code, stdout and stderr."""
    monkeypatch.setattr(bench, "_DECODED", 2)

    def run(*arguments):
        given = ("--model", str(folder), "--device", "cpu", "--lengths", "300", "--repeats", "1")
        code = bench.main([*given, *arguments])
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_number_type_is_the_one_asked_for(call, dtype):
    # The tiny model's heads were stored for the weights as they are in the other two types.
    specs = ["dense", "streaming", "retrieval"][: 2 if dtype == "float16" else 3]
    code, out, err = call("--mechanisms", " ".join(specs), "--dtype", dtype, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["dtype"] == dtype and f"--dtype {dtype}" in result["command"]
    assert [row["mechanism"] for row in result["rows"]] == specs
    assert all(row["prefill_tokens_per_s"] > 0 for row in result["rows"])
    assert ["decode_ratio" in row for row in result["rows"]] == [True, True, False][: len(specs)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_result_is_not_timed(call, dtype, monkeypatch):
    theirs = bench._theirs

    def other(model, tokens):
        return theirs(model, [*tokens[:-1], (tokens[-1] + 1) % 300])

    monkeypatch.setattr(bench, "_theirs", other)
    with pytest.raises(AssertionError, match="dense differs from transformers"):
        call("--mechanisms", "dense", "--dtype", dtype)


@pytest.mark.parametrize(
    "arguments,told",
    [(["--dtype", "int8"], "int8"), (["--repeats", "0"], "measures nothing"), (["--lengths", "0"], "no length")],
)
def test_bad_arguments_get_one_line(call, arguments, told):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert told in err and err.startswith("bench: ") and len(err.splitlines()) == 1


def test_the_command_measures_what_the_module_does(call, folder, calibrated, capfd, monkeypatch):
    from longspan.cli import run

    given = ("--model", str(folder), "--device", "cpu", "--lengths", "300", "--repeats", "1", "--mechanisms", "dense")
    monkeypatch.setattr("sys.argv", ["longspan", "bench", "model", *given])
    assert run(["bench", "model", *given, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    code, out, _ = call("--mechanisms", "dense", "--json")
    module = json.loads(out)
    assert code == 0 and set(found) == set(module) and set(found["rows"][0]) == set(module["rows"][0])
    assert found["command"].startswith("longspan bench model --model")
    assert run(["bench", "model", *given]) == 0
    shown = capfd.readouterr().out
    assert "mechanism" in shown and "dense" in shown and "300" in shown
    assert run(["bench", "model", "--repeats", "0"]) == 2
    assert "measures nothing" in capfd.readouterr().err


def test_a_type_has_room_for_a_few_of_its_last_bits():
    assert bench._tolerance(torch.float32) == 2e-3
    assert bench._tolerance(torch.float16) < 0.006 < bench._tolerance(torch.bfloat16) < 0.05
