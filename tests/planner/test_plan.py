"""Plans: the numbers that must come out, what fits, what to change, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

import longspan
from longspan.engine import contexts
from longspan.errors import LongspanError, ModelError, UnknownNameError, UsageError
from longspan.hf.configuration import configuration, short
from longspan.planner import devices, formats, memory
from longspan.planner.limits import MOST, longest
from longspan.planner.plan import plan


def kv_gb(model, context, **options):
    return plan(model, context, gpu="a100", weights="fp16", **options).memory.kv / 1e9


def test_the_formula():
    """`2 L Hkv D n bytes`, in decimal units."""
    assert kv_gb("llama-3.1-70b", 10**6) == 2 * 80 * 8 * 128 * 10**6 * 2 / 1e9 == 327.68
    assert kv_gb("llama-2-70b", "1M") == 327.68
    assert 327.68 / (devices.device("a100").nominal / 1e9) == pytest.approx(4.1, abs=0.005), "five of them, by division"
    whole = configuration("llama-3.1-70b").fields | {"num_key_value_heads": 64}
    assert kv_gb(whole, "1M") == pytest.approx(2621.44), "with 64 KV heads"
    assert kv_gb("llama-2-7b", 131_072) == pytest.approx(68.72, abs=0.005)
    assert devices.device("a100").nominal == 80e9
    assert kv_gb("nemotron-3-nano-30b", "1M") == pytest.approx(6.144)
    assert kv_gb("llama-2-70b", 4096) == pytest.approx(1.34, abs=0.005)
    assert kv_gb(configuration("llama-2-70b").fields | {"num_key_value_heads": 64}, 4096) == pytest.approx(
        10.74, abs=0.005
    )


@pytest.mark.parametrize(
    "model, count",
    [("nemotron-3-nano-30b", 6144), ("qwen3-30b-a3b", 98_304), ("llama-3.1-8b", 131_072), ("smollm2", 23_040),
     ("deepseek-v3", 70_272)],
)  # fmt: skip
def test_bytes_a_token(model, count):
    assert plan(model, 1000, gpu="h200").told()["kv_bytes_per_token"] == count


def test_windows_bound_what_a_layer_keeps():
    """Gemma-3-27B: of 62 layers 52 keep 1,024 tokens."""
    token = 2 * 16 * 128 * 2
    assert plan("gemma-3-27b", 131_072, gpu="h200").memory.kv == token * (10 * 131_072 + 52 * 1024)


def test_ring_over_eight_ranks():
    found = plan("llama-3.1-8b", "1M", gpu="h100", gpus=8)
    assert found.asked.placement.name == "ring"
    assert (found.sent.rank_tokens, found.sent.steps, found.sent.passes) == (125_000, 8, 7)
    alone = plan("llama-3.1-8b", "1M", gpu="h100")
    assert found.memory.kv == alone.memory.kv / 8 and found.memory.weights == alone.memory.weights
    assert found.fits and not alone.fits


def test_memory_of_weights():
    found = {name: plan("llama-3.1-8b", 1000, gpu="h100", weights=name).memory.weights for name in formats.WEIGHTS}
    assert found["bf16"] == found["fp16"] == 2 * 8_030_261_248
    assert found["fp32"] == 2 * found["bf16"]
    # Embedding, output layer and norms stay in 16 bits.
    rest = 2 * (2 * 128_256 * 4096 + 65 * 4096)
    assert found["fp8"] - rest == pytest.approx((found["bf16"] - rest) / 2, rel=1e-3)
    assert found["int4"] - rest == pytest.approx((found["bf16"] - rest) / 4 * 1.039, rel=1e-3)


def test_states_and_copies():
    nemotron = plan("nemotron-3-nano-30b", "1M", gpu="h200")
    one = 23 * (64 * 64 * 128 * 4 + 6144 * 4 * 2)
    assert 2 * one < nemotron.memory.state <= 2 * one + 0.25 * nemotron.memory.kv
    assert nemotron.memory.rotated == 0, "its keys have no positions"
    llama = plan("llama-3.1-8b", "100K", gpu="h200")
    assert llama.memory.rotated == llama.memory.kv / 2
    assert plan("llama-3.1-8b", "100K", gpu="h200", kv="fp8").memory.rotated == 0
    assert plan("llama-3.1-8b", "100K", gpu="h200", attention="streaming").memory.rotated == 0
    assert plan("llama-3.1-8b", "100K", gpu="h200", attention="h2o").memory.rotated == 0


def test_concurrent_contexts_share_weights_alone():
    one, four = (plan("llama-3.1-8b", "32K", gpu="h200", concurrent=count) for count in (1, 4))
    assert four.memory.kv == 4 * one.memory.kv and four.memory.weights == one.memory.weights
    assert four.step.low < 4 * one.step.low and four.step.high > one.step.high


@pytest.mark.parametrize("model", short())
def test_every_model_of_the_catalogue_can_be_planned(model):
    found = plan(model, "100K", gpu="h200", attention="superlinear")
    told = found.told()
    json.dumps(told)
    assert found.memory.total > 0 and 0 < found.prefill.low <= found.prefill.high
    assert 0 < found.step.low <= found.step.high < float("inf")
    assert told["fits"] == (told["memory"]["total"] <= told["device_memory"])
    assert sum(value for name, value in told["memory"].items() if name != "total") == pytest.approx(
        told["memory"]["total"], abs=4
    )
    assert found.by, "what it rests on is told"


def test_every_mechanism_can_be_planned_and_reads_less_than_more():
    for name in longspan.mechanisms():
        small, large = (plan("llama-3.1-8b", n, gpu="h200", attention=name) for n in ("16K", "256K"))
        assert small.memory.total <= large.memory.total and small.prefill.low < large.prefill.low, name


def test_estimates_name_the_files_and_rows_that_they_rest_on():
    found = plan("llama-3.1-8b", "1M", gpu="h200", attention="superlinear")
    assert any("benchmarks/results/attention-h200.json row" in line for line in found.by)
    carried = plan("llama-3.1-8b", "1M", gpu="b200", attention="superlinear").by
    assert any("carried over" in line for line in carried)
    assert any("not measured on a GPU" in line for line in plan("llama-3.1-8b", "1M", gpu="h200", attention="tree").by)
    assert any("model-cpu.json row" in line for line in plan("smollm2", 4096, gpu="cpu").by)


def test_advice_comes_in_order_and_ends_with_what_fits():
    found = plan("llama-3.1-70b", "1M", gpu="h100")
    options = [each.option for each in found.advice]
    assert options[0] == "--kv-budget"
    assert options.index("--kv int8") < options.index("--kv int4") < options.index("--weights fp8")
    assert [each.fits for each in found.advice].index(True) == len(found.advice) - 1
    totals = [each.total for each in found.advice]
    assert totals == sorted(totals, reverse=True) and totals[-1] <= found.asked.device.memory
    assert "benchmarks/results/compress" in next(each.harm for each in found.advice if each.option == "--kv int4")
    assert plan("llama-3.1-8b", 1000, gpu="h100").advice == ()


def test_advice_can_be_taken():
    found = plan("llama-3.1-8b", "1M", gpu="h100")
    assert found.advice[-1].option == "--gpu h200"
    again = plan("llama-3.1-8b", "1M", gpu="h200")
    assert again.memory.total - again.memory.rotated == found.advice[-1].total <= again.asked.device.memory
    gpus = plan("qwen2.5-72b", 1000, gpu="b200", concurrent=500)
    assert "--concurrent 1" in [each.option for each in gpus.advice]


def test_longest_contexts_fit_and_no_more():
    asked = plan("nemotron-3-nano-30b", "1M", gpu="h100").asked
    found = {each.attention: each.tokens for each in longest(asked)}
    assert list(found) == list(longspan.mechanisms())
    assert found["streaming"]["bf16"] is None and found["infini"]["bf16"] is None
    for kv, tokens in found["dense"].items():
        at = dataclasses.replace(asked, kv=kv, context=tokens, rotated=False)
        assert at.memory().total <= asked.device.memory
        assert dataclasses.replace(at, context=round(1.01 * tokens)).memory().total > asked.device.memory
    assert found["dense"]["bf16"] < found["dense"]["fp8"] < found["dense"]["int4"] < MOST
    small = plan("llama-3.1-70b", "1K", gpu="rtx4090").asked
    assert {count for each in longest(small) for count in each.tokens.values()} == {0}, "not even the weights fit"


def test_a_trained_length_is_told():
    assert "trained for 128Ki" in plan("llama-3.1-8b", "1M", gpu="h200").notes[0]
    assert plan("llama-3.1-8b", "1M", gpu="h200", attention="superlinear").notes == ()


def test_chunks_are_the_engines():
    assert (memory.CHUNK, memory.GPU_CHUNK) == (contexts.CHUNK, contexts.GPU_CHUNK)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"gpu": "h300"}, "h100"), ({"weights": "int3"}, "int4"), ({"kv": "fp9"}, "fp8"), ({"kv": "fp32"}, "wider"),
        ({"attention": "quadratic"}, "dense"), ({"attention": "tree:leafs=3"}, "leaves"),
        ({"context": "much"}, "128Ki"), ({"gpus": 2, "placement": "circle"}, "ring"),
        ({"placement": "circle"}, "ring"), ({"placement": "star"}, "several GPUs"),
        ({"context": 0}, "context=0"), ({"concurrent": 0}, "concurrent=0"), ({"gpus": 0}, "gpus=0"),
        ({"nodes": -1}, "nodes=-1"), ({"network": 0.0}, "network"), ({"network": float("nan")}, "network"),
        ({"chunk": 0}, "chunk=0"), ({"gpus": 2, "gpu": "cpu"}, "GPUs alone"),
        ({"gpus": 2, "placement": "star", "attention": "superlinear"}, "sharded"), ({"model": "llama"}, "llama-3.1-8b"),
        ({"gpus": 2, "attention": "h2o"}, "one GPU"), ({"gpus": 2, "placement": "star", "anchor": 10**9}, "anchor"),
        ({"model": {}}, "hidden_size"), ({"concurrent": 1.5}, "concurrent"), ({"context": True}, "context"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_a_line(options, told):
    given = {"model": "llama-3.1-8b", "context": "128K", "gpu": "h100"} | options
    with pytest.raises(LongspanError) as caught:
        plan(given.pop("model"), given.pop("context"), **given)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, (UsageError, ModelError, UnknownNameError))


def test_what_is_here_is_found_or_named(monkeypatch):
    for told, name in (
        ("cuda (NVIDIA H100 80GB HBM3)", "h100"), ("cuda (NVIDIA H200)", "h200"), ("cpu (2 cores)", "cpu"),
        ("cuda (NVIDIA A100-SXM4-80GB)", "a100"), ("cuda (NVIDIA GeForce RTX 5090)", "rtx5090"),
    ):  # fmt: skip
        monkeypatch.setattr(devices.detected, "device", lambda told=told: told)
        assert devices.device("auto").name == name
    for told in ("cuda (NVIDIA A100-SXM4-40GB)", "cuda (Tesla T4)"):
        monkeypatch.setattr(devices.detected, "device", lambda told=told: told)
        with pytest.raises(UnknownNameError, match="name one with --gpu"):
            devices.device("auto")


def test_devices_have_sources():
    for each in devices.devices().values():
        assert each.sources and each.bandwidth > 0 and each.link > 0 and each.flops
        if each.gpu:
            # Drivers count what vendors sell by the decimal gigabyte in binary ones, less what they keep.
            assert 0.95 < each.memory / each.nominal < 1.1 and each.peak("fp8") >= each.peak("bf16")


def test_chunks_are_the_most_that_fit_where_the_engine_plans():
    from longspan.engine import memory_plan
    from longspan.hf.native import decoder
    from longspan.planner import memory

    assert memory.NATIVE_CHUNKS == memory_plan.CHUNKS and ("nemotron_h", *decoder._FAMILIES) == memory.NATIVE
    assert (memory._STATES, memory.SLACK) == (memory_plan.STATES, memory_plan._SLACK)
    assert plan("nemotron-3-nano-30b", "1M", gpu="h200").asked.chunk == 32768
    far = plan("nemotron-3-nano-30b", 2_600_000, gpu="h100", attention="superlinear")
    assert far.fits and far.asked.chunk == 16384
    assert plan("nemotron-3-nano-30b", "3M", gpu="h100").asked.chunk == 2048
    for other in (
        plan("gemma-3-27b", "8K", gpu="h200"),
        plan("llama-3.1-8b", "8K", gpu="h200", weights="fp8"),
        plan("llama-3.1-8b", "8K", gpu="h200", kv="int8"),
        plan("llama-3.1-8b", "8K", gpu="h200", attention="streaming"),
        plan("llama-3.1-8b", "8K", gpu="h200", gpus=2, placement="ring"),
    ):
        assert other.asked.chunk == memory.GPU_CHUNK
    assert plan("llama-3.1-8b", "8K", gpu="h200", chunk=100).asked.chunk == 100
    assert plan("llama-3.1-8b", "8K", gpu="cpu").asked.chunk == memory.CHUNK
