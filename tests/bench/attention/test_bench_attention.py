"""`longspan bench attention` from its command line to its JSON, on a CPU with tiny contexts."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longspan.attention.superlinear import Superlinear
from longspan.bench import timing
from longspan.bench.attention import report, sides
from longspan.cli import run
from longspan.evals import journal

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = (
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--head-dim",
    "32",
    "--chunk",
    "64",
    "--options",
    "window=48",
    "--seconds",
    "0.02",
)


@pytest.fixture
def bench(tmp_path, monkeypatch, capfd):
    """Runs the command; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(timing._MATMUL, "cpu", 64)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["longspan", "bench", "attention", *arguments])
        code = run(["bench", "attention", *arguments])
        return code, *capfd.readouterr()

    return call


def test_one_command_measures_every_part_beside_its_peers(bench):
    code, out, err = bench(*SMALL, "--lengths", "256,512", "--what", "decode,prefill,backward", "--json")
    assert code == 0, err
    found = json.loads(out)
    for key in ("device", "python", "torch", "transformers", "longspan", "triton"):
        assert found[key], key
    assert found["command"].startswith("longspan bench attention --heads 4")
    assert found["of"]["mechanism"] == "superlinear:window=48" and found["of"]["dtype"] == "float32"
    parts = [(row["what"], row["length"], row["queries"]) for row in found["rows"]]
    assert parts == [
        ("decode", 256, 1), ("decode", 512, 1), ("prefill", 256, 64), ("prefill", 512, 64), ("backward", 256, 64),
        ("backward", 512, 64),
    ]  # fmt: skip
    for row in found["rows"]:
        ours, dense = row["sides"]["longspan"], row["sides"]["sdpa"]
        assert list(row["sides"]) == ["longspan", "superlinear", "sdpa"]
        assert row["sides"]["superlinear"] == {"skipped": "its kernels run on CUDA only"}
        assert row["ratios"] == {"sdpa": pytest.approx(dense["seconds"] / ours["seconds"], rel=1e-3)}
        assert dense["dense"] and not ours["dense"]
        for side in (ours, dense):
            assert 0 < side["low"] <= side["seconds"] <= side["high"] and side["turns"] >= 1
            assert 0 < side["error"] < 1e-4 and side["rows"] >= 6
        if row["what"] == "backward":
            assert ours["forward_seconds"] > 0
        else:
            reached = ours["floor"]["bytes"] / ours["seconds"] / row["peaks"]["copy_bytes_per_s"]
            assert ours["share_of_bandwidth"] == pytest.approx(reached, rel=1e-3)
            assert ours["floor"]["flops"] > 0 and ours["share_of_matmul"] > 0
    scaling = {(line["what"], line["side"]): line for line in found["scaling"]}
    assert set(scaling) == {(what, side) for what in ("decode", "prefill", "backward") for side in ("longspan", "sdpa")}
    assert scaling["decode", "longspan"]["exponent"] is not None
    assert set(scaling["prefill", "sdpa"]["ours_faster_from"]) >= {"length"}


def test_a_table_for_people(bench):
    code, out, err = bench(*SMALL, "--lengths", "256", "--routing", "trained", "--what", "decode")
    assert code == 0, err
    assert "/ ours" in out and "decode: superlinear is left out: its kernels run on CUDA only" in out
    (dense,) = [line for line in out.splitlines() if line.startswith("decode ") and " sdpa " in line]
    assert dense.split()[:3] == ["decode", "256", "sdpa"] and "x " in dense
    assert "longspan: decode at 256: longspan " in err


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_a_wrong_output_of_ours_has_no_figure_and_fails(bench, what, monkeypatch):
    right = Superlinear.attend_tile

    def wrong(self, q, kv, first, scale, hints):
        out = right(self, q, kv, first, scale, hints)
        out[:, -1] *= 1.001
        return out

    monkeypatch.setattr(Superlinear, "attend_tile", wrong)
    code, out, err = bench(*SMALL, "--lengths", "256", "--what", what, "--json", "--out", "found")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("longspan: longspan: a sampled output differs by 0.001 of its length")
    assert len(Path("found/attention.jsonl").read_text().splitlines()) == 1  # the environment


def test_what_was_never_written_is_wrong(bench, monkeypatch):
    monkeypatch.setattr(Superlinear, "attend_tile", lambda self, q, *_: torch.full_like(q, float("nan")))
    code, out, err = bench(*SMALL, "--lengths", "256", "--what", "decode")
    assert (code, out) == (1, "") and "longspan gives numbers that are not finite: not timed" in err


def test_a_wrong_or_failing_peer_is_left_out_and_the_others_go_on(bench, monkeypatch):
    def wrong(self, inputs):
        return lambda: inputs.q * 0.5

    def failing(self, inputs):
        raise RuntimeError("no\nkernel image")

    monkeypatch.setattr(sides.Sdpa, "decode", wrong)
    monkeypatch.setattr(sides.Sdpa, "prefill", failing)
    code, out, err = bench(*SMALL, "--lengths", "256", "--json")
    assert code == 0, err
    decode, prefill = (row["sides"] for row in json.loads(out)["rows"])
    assert "output differs by" in decode["sdpa"]["skipped"] and decode["longspan"]["seconds"] > 0
    assert prefill["sdpa"] == {"skipped": "RuntimeError: no kernel image"} and prefill["longspan"]["seconds"] > 0


def test_a_peer_says_why_it_is_not_measured(monkeypatch):
    def given(length, queries, device):
        return SimpleNamespace(q=SimpleNamespace(device=torch.device(device)), first=length - queries)

    monkeypatch.setitem(sys.modules, "superlinear", None)
    some = given(256, 64, "cuda")
    assert "pip install --no-deps superlinear==0.1.0" in sides.Published(Superlinear()).missing("decode", some)
    assert "searches by keys" in sides.Published(Superlinear(sinks=4)).missing("decode", some)
    assert "CUDA only" in sides.Published(Superlinear()).missing("decode", given(256, 64, "cpu"))
    assert "no causal mask" in sides.Cudnn().missing("backward", some)
    assert sides.Cudnn().missing("backward", given(256, 256, "cuda")) is sides.Cudnn().missing("prefill", some) is None


def test_options_in_the_words_of_the_published_package():
    assert sides.Published(Superlinear())._options() == {
        "sw_index": 44,
        "backward_factor": 3.0,
        "forward_factor": 1.0,
        "span_power": 0.5,
        "search_power": None,
        "inv_search_power_int": 2,
    }
    uneven = sides.Published(Superlinear(power=0.55, window=2032))
    assert uneven._options()["search_power"] == 0.55 and uneven._options()["inv_search_power_int"] is None
    assert uneven.truth.gate == "routed"


def test_a_stopped_run_goes_on_and_files_are_merged(bench):
    given = (*SMALL, "--lengths", "256,512", "--out", "found")
    code, out, err = bench(*given, "--minutes", "1e-9", "--json")
    assert code == 2 and "there is no row yet" in err
    assert "without decode at 256, prefill at 256, decode at 512, prefill at 512: the same command goes on" in err
    assert bench(*given, "--what", "decode", "--json")[0] == 0
    code, out, err = bench(*given, "--json")
    assert code == 0 and "decode at 256" not in err
    rows = json.loads(out)["rows"]
    assert [row["what"] for row in rows] == ["decode"] * 2 + ["prefill"] * 2
    assert [row["run"] for row in rows] == [0, 0, 1, 1]
    assert "found" not in json.loads(out)["command"] and "--lengths 256,512 --json" in json.loads(out)["command"]
    code, again, err = bench("--merge", "found/attention.jsonl", "--json")
    assert code == 0 and json.loads(again) == json.loads(out)


def test_ctrl_c_says_what_is_kept(bench, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Superlinear, "attend_tile", stop)
    code, out, err = bench(*SMALL, "--lengths", "256", "--out", "found")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "longspan: stopped: the same command goes on from found"


def entry(device, length, ours, dense):
    figures = {"longspan": {"seconds": ours}, "sdpa-flash": {"seconds": 3 * dense, "dense": True}}
    figures["sdpa-cudnn"] = {"seconds": dense, "dense": True}
    row = {"what": "decode", "length": length, "sides": figures, "of": {"device": device}}
    return journal.Entry(row, {"device": device})


def test_of_two_rows_of_one_length_the_later_stands_and_the_best_dense_side_is_beaten():
    found = report.result([entry("H", 4096, 9.0, 1.0), entry("H", 1024, 2.0, 1.0), entry("H", 4096, 4.0, 16.0)])
    assert [row["length"] for row in found["rows"]] == [1024, 4096]
    lines = {line["side"]: line for line in found["scaling"]}
    assert lines["longspan"]["exponent"] == 0.5 and lines["fastest dense"]["exponent"] == 2
    assert lines["fastest dense"]["ours_faster_from"] == lines["sdpa-cudnn"]["ours_faster_from"]
    # Ratio 1/2 at 1K, 4 at 4K: it passes 1 after a third of the way.
    assert lines["sdpa-cudnn"]["ours_faster_from"] == {"length": round(1024 * 4 ** (1 / 3))}
    assert lines["sdpa-flash"]["ours_faster_from"] == {"length": None, "faster": "always"}


def test_rows_of_two_devices_are_not_one_result(bench):
    for name in ("a", "b"):
        with journal.Journal(Path(f"{name}.jsonl")) as file:
            one = entry(name, 1024, 1.0, 2.0)
            file.begin(one.environment)
            file.append(one.row)
    code, out, err = bench("--merge", "a.jsonl", "b.jsonl")
    assert (code, out) == (2, "")
    assert err.strip() == "longspan: rows with device a and b can't be one result: merge them apart"


@pytest.mark.parametrize("seconds,told", [(2.5e-5, "25 us"), (0.0123, "12.3 ms"), (2, "2 s"), (12345, "12,345 s")])
def test_times_for_people(seconds, told):
    assert report.duration(seconds) == told


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--lengths", "4X"], "'4X' is no length"),
        (["--lengths", "1000"], "1000 tokens are no whole number of pages"),
        (["--mechanism", "quest"], "can't be checked here: use one of dense, superlinear"),
        (["--mechanism", "linear"], "unknown attention 'linear'"),
        (["--options", "windows=3"], "has no option 'windows'"),
        (["--options", "window"], "must be written name=value"),
        (["--peers", "flash"], "unknown peer 'flash': use superlinear, sdpa"),
        (["--what", "training"], "unknown part 'training': use decode, prefill, backward"),
        (["--what", ""], "no part is named"),
        (["--routing", "lucky"], "unknown routing 'lucky': use random or trained"),
        (["--heads", "3"], "--heads must be a multiple of --kv-heads"),
        (["--heads", "0"], "--heads must be a multiple of --kv-heads"),
        (["--chunk", "none"], "'none' is no length"),
        (["--seconds", "0"], "--seconds 0 measures nothing"),
        (["--minutes", "0"], "--minutes 0 leaves no time"),
        (["--device", "cuda"], "no CUDA device is available"),
        (["--merge"], "--merge needs files"),
        (["file.jsonl"], "files are for --merge alone"),
        (["--merge", "missing.jsonl"], "can't read missing.jsonl"),
        (["--heads", "many"], "(see: longspan bench attention --help)"),
    ],
)
def test_bad_arguments_get_one_line(bench, arguments, told):
    if told.startswith("no CUDA") and torch.cuda.is_available():
        pytest.skip("there is one")
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert told in err and len(err.splitlines()) == 1, err
