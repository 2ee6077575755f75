"""Plans against reality: results of whole models, of one layer and of two GPUs lie within what is stated."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import planner as made  # noqa: E402
from benchmarks.plan_tables import work_of  # noqa: E402

from longspan.planner import devices, measured, parallel, times  # noqa: E402
from longspan.planner.measured import Range, Source, plus, summary  # noqa: E402
from longspan.planner.memory import GPU_CHUNK, memory  # noqa: E402
from longspan.planner.model import Attention, Layer, Model  # noqa: E402
from longspan.planner.parallel import PLACEMENTS, Ranks  # noqa: E402
from longspan.planner.reading import model  # noqa: E402
from longspan.planner.times import Work  # noqa: E402

ROWS = list(made.models())
IDS = [f"{Path(row['file']).stem}-{row['row']}" for row in ROWS]


def test_what_the_package_knows_is_what_is_committed():
    assert made.main(["--check"]) == 0, "run: make docs"


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_speeds_lie_within_the_stated_range(row):
    work = work_of(row)
    prefill = times.prefill(work)
    if "prefill" not in row:
        assert prefill.low <= row["length"] / row["prefill_tokens_per_s"] <= prefill.high
    if speed := row.get("decode_tokens_per_s"):
        step = times.decode(work)
        assert step.low <= 1 / speed <= step.high
        assert step.high / step.low < 2, "a range around a measurement says something"
    assert any(row["file"] in line for line in summary(prefill.by)) or "prefill" in row


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_speeds_are_predicted_from_the_other_rows(row, monkeypatch):
    """With the row itself left out: from another context of the same mechanism, if there is one."""
    known = measured.entries()
    others = [e for e in known["models"] if (e["file"], e["row"]) != (row["file"], row["row"])]
    alike = [
        e
        for e in others
        if (e["mechanism"], e["device"], e["model"]) == tuple(row[k] for k in ("mechanism", "device", "model"))
    ]
    near = [e for e in alike if max(e["length"], row["length"]) <= 4 * min(e["length"], row["length"])]
    if not near or row["mechanism"] not in ("dense", "streaming") or "decode_tokens_per_s" not in row:
        pytest.skip("no other row is of the same mechanism nearby")
    monkeypatch.setattr(measured, "entries", lambda: {**known, "models": others})
    step = times.decode(work_of(row))
    assert step.low <= 1 / row["decode_tokens_per_s"] <= step.high


@pytest.mark.parametrize(
    "row", [r for r in ROWS if "peak_bytes" in r], ids=lambda r: f"{Path(r['file']).stem}-{r['row']}"
)
def test_peak_memory_is_within_a_twentieth(row):
    work = work_of(row)
    held = memory(
        work.model, work.n, attention=work.attention, weights=work.weights, kv=work.kv, chunk=work.chunk, gpu=True
    )
    assert held.allocated == pytest.approx(row["peak_bytes"], rel=0.05)


@pytest.mark.parametrize(
    "entry", list(made.attention()), ids=lambda e: f"{Path(e['file']).stem}-{e['row']}-{e['by'] or 'ours'}-{e['what']}"
)
def test_one_layers_attention_lies_within_the_stated_range(entry):
    device = devices.of(entry["device"])
    dims = entry["heads"], entry["kv_heads"], entry["head_dim"], entry["head_dim"]
    layer = Model("layer", "", 4096, 1, [Layer(Attention(*dims), None, None, 0, 1)], 1, 1, 0, None)

    def seconds(n):
        work = Work(layer, n, entry["mechanism"], "bf16", "bf16", 1, device, GPU_CHUNK)
        return times.decode_attention(work) if entry["what"] == "decode" else times.prefill_attention(work)

    found = seconds(entry["length"])
    if entry["what"] == "decode":
        assert found.low <= entry["seconds"] <= found.high
    elif (before := entry["length"] - entry["queries"]) > 0:
        # The newest queries: what the whole context takes more than the one before. Ends of ranges do not subtract.
        middle = found.middle - seconds(before).middle
        assert middle / 2.2 <= entry["seconds"] <= middle * 2.2


TWO_H100 = [
    (131_072, "context_parallel", 0.125),
    (524_288, "context_parallel", 2.034),
    (524_288, "context_parallel", 2.197),
]
ONE_H100 = [(131_072, 0.236), (524_288, 4.446)]
"""Seconds of one layer of 32 heads (docs/planning.md): torch's context_parallel with cuDNN, and one GPU."""
HEADS = Model("layer", "", 4096, 1, [Layer(Attention(32, 32, 128, 128), None, None, 0, 1)], 1, 1, 0, None)


@pytest.mark.parametrize("n, how, seconds", TWO_H100)
def test_two_gpus_take_as_long_as_was_measured(n, how, seconds):
    work = Work(HEADS, n, "dense", "bf16", "bf16", 1, devices.device("h100"), GPU_CHUNK)
    found = parallel.prefill(work, Ranks(2), PLACEMENTS[how])
    assert found.low <= seconds <= found.high


@pytest.mark.parametrize("n, seconds", ONE_H100)
def test_one_gpu_takes_as_long_as_was_measured(n, seconds):
    found = times.prefill_attention(Work(HEADS, n, "dense", "bf16", "bf16", 1, devices.device("h100"), GPU_CHUNK))
    assert found.low <= seconds <= found.high


def test_rows_of_long_contexts_are_read():
    """As `longspan bench model --context` writes them: medians with quartiles, bytes by kind, the model beside rows."""
    about = {"device": "NVIDIA H200", "threads": 16, "of": {"model": "nemotron-3-nano-30b", "dtype": "bfloat16"}}
    row = {"attention": "superlinear", "context": 65536, "prefill_tokens_per_s": 40000.0, "chunk": 32768,
           "decode_tokens_per_s": [150.0, 149.0, 151.0], "memory": {"weights": 1, "peak": 70_000_000_000}}  # fmt: skip
    found = made.model_row(about, row)
    assert found["model"] == "nemotron-3-nano-30b" and found["dtype"] == "bfloat16"
    assert found["mechanism"] == "superlinear" and found["length"] == 65536 and found["chunk"] == 32768
    assert found["prefill_tokens_per_s"] == 40000.0 and found["decode_tokens_per_s"] == 150.0
    assert found["peak_bytes"] == 70_000_000_000
    assert made.model_row(about, {**row, "attention": "transformers"}) is None, "a peer's"
    assert made.model_row(about, {"attention": "dense", "context": 10**7, "left_out": "too long"}) is None


def test_a_row_of_a_gpu_narrows_its_plans(monkeypatch):
    known = measured.entries()
    row = {"file": "benchmarks/results/model-x.json", "row": 0, "device": "NVIDIA H200", "threads": 16,
           "model": "llama-3.1-8b", "dtype": "bfloat16", "mechanism": "dense", "length": 65536,
           "prefill_tokens_per_s": 21000.0, "decode_tokens_per_s": 120.0}  # fmt: skip
    work = Work(model("llama-3.1-8b"), 65536, "dense", "bf16", "bf16", 1, devices.device("h200"), GPU_CHUNK)
    wide = times.decode(work), times.prefill(work)
    monkeypatch.setattr(measured, "entries", lambda: {**known, "models": [*known["models"], row]})
    step, prefill = times.decode(work), times.prefill(work)
    assert step.low <= 1 / 120 <= step.high and prefill.low <= 65536 / 21000 <= prefill.high
    for before, after in zip(wide, (step, prefill), strict=True):
        assert after.high / after.low < before.high / before.low
        assert any("model-x.json row 0" in line for line in summary(after.by))
    other = Work(model("llama-3.1-8b"), 65536, "tree", "bf16", "bf16", 1, devices.device("h200"), GPU_CHUNK)
    assert any("model-x.json row 0" in line for line in summary(times.decode(other).by)), (
        "dense's, for all but attention"
    )


def test_sources_are_told_in_a_few_lines():
    one, two = Source("a.json", 3), Source("a.json", 1)
    ranges = plus(Range(1, 4, (one, two)), Range(1, 4, (Source("", 0, "no row"), one)))
    assert (ranges.low, ranges.high, ranges.middle) == (2, 8, 4)
    assert summary(ranges.by) == ["a.json rows 1, 3", "no row"]
