"""What only a GPU runs: CUDA graphs, events, PyTorch's kernels, and the published package where it is installed."""

import importlib.util
import json

import pytest
import torch

from longspan.bench import timing
from longspan.bench.attention import checks, inputs, sides
from longspan.cli import run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PUBLISHED = importlib.util.find_spec("superlinear") is not None


def test_a_captured_step_writes_where_it_wrote_before():
    x = torch.ones(4, device="cuda")
    replay, outs = timing.captured([lambda: x + 1, lambda: x * 3])
    for value in (2.0, 5.0):
        x.fill_(value)
        replay()
        assert [out.tolist() for out in outs] == [[value + 1] * 4, [value * 3] * 4]
    assert 0 < timing.timed(replay, torch.device("cuda"), ahead=True) < 1


@pytest.mark.parametrize("length,queries", [(4096, 4096), (8192, 1024), (8192, 63), (4096, 1)])
@pytest.mark.parametrize("side", [sides.Cudnn(), sides.Flash()], ids=lambda side: side.name)
def test_dense_sides_are_right(side, length, queries):
    shape = inputs.Shape(32, 2, 128, torch.bfloat16, torch.device("cuda"), 2024)
    (given,) = inputs.make(shape, length, queries, "random", 0)
    with torch.no_grad():
        out = (side.decode if queries == 1 else side.prefill)(given)()
    assert checks.outputs(side, given, out, checks.rows_of(32, queries, 24, 0)).error > 0


def test_the_command_on_a_gpu(monkeypatch, capfd):
    given = ("--lengths", "8K,16K", "--chunk", "2K", "--options", "gate=routed", "--seconds", "0.05")
    monkeypatch.setattr("sys.argv", ["longspan", "bench", "attention", *given])
    assert run(["bench", "attention", *given, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["of"]["dtype"] == "bfloat16" and found["cudnn"]
    for row in found["rows"]:
        assert list(row["sides"]) == ["longspan", "superlinear", "sdpa-cudnn", "sdpa-flash"]
        for name, figures in row["sides"].items():
            if name == "superlinear" and not PUBLISHED:
                assert "pip install" in figures["skipped"]
                continue
            assert figures["seconds"] > 0 and figures["extra_bytes"] >= 0, (name, figures)
    assert {line["side"] for line in found["scaling"]} >= {"longspan", "fastest dense"}
