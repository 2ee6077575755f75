"""The bench of a whole model at long contexts: what is checked first, what is measured, what a result says."""

import json

import pytest
import torch

from longspan.attention import parse
from longspan.bench.long import checks, measure, run
from longspan.cli import run as command
from longspan.engine import memory_plan
from longspan.errors import PoolExhaustedError, UnknownNameError
from longspan.hf.configuration import configuration
from longspan.hf.random_weights import random_model

pytestmark = pytest.mark.usefixtures("one_thread", "places")

SMALL = {
    "nemotron-3-nano-30b": {
        "hidden_size": 64, "vocab_size": 512, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 2, "num_attention_heads": 4, "head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "hybrid_override_pattern": "MEM*E",
        "num_hidden_layers": 5,
    },
    "qwen3-4b": {
        "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "head_dim": 16,
    },
}  # fmt: skip
"""What makes a model of the catalogue small enough for here."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, fields in SMALL.items():
        made[name] = tmp_path_factory.mktemp(name)
        (made[name] / "config.json").write_text(json.dumps({**configuration(name).fields, **fields}))
    return made


@pytest.fixture(scope="module")
def tiny(folders):
    return {
        name: random_model(str(folder), device="cpu", dtype=torch.float32, native=True)
        for name, folder in folders.items()
    }


@pytest.fixture
def call(folders, capfd, monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 2)
    monkeypatch.setattr(measure, "BATCHES", 3)

    def measured(*arguments, model="nemotron-3-nano-30b"):
        given = ["bench", "model", "--model", str(folders[model]), "--random-weights", "--device", "cpu"]
        given += ["--dtype", "float32", *arguments]
        monkeypatch.setattr("sys.argv", ["longspan", *given])
        return command(given), *capfd.readouterr()

    return measured


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_keep_activations_in_size(tiny, name):
    model = tiny[name]
    tokens = checks.random_tokens(model, 64, 0)
    logits = checks._logits(model, tokens, 64)
    head = model.model.lm_head.weight.norm(dim=1).mean()
    assert 0.5 < logits.std() / head < 2
    assert logits.isfinite().all()


def test_one_seed_gives_one_model(folders, tiny):
    again, other = (
        random_model(str(folders["qwen3-4b"]), device="cpu", dtype=torch.float32, seed=seed) for seed in (0, 1)
    )
    same = dict(tiny["qwen3-4b"].model.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, same[name])
    assert any(not torch.equal(parameter, same[name]) for name, parameter in other.model.named_parameters())
    with pytest.raises(UnknownNameError, match="nemotron-3-nano-30b"):
        random_model("nothing-of-that-name")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_model_passes(folders, name, dtype):
    model = random_model(str(folders[name]), device="cpu", dtype=dtype, native=True)
    found = checks.check(model, [parse("superlinear:window=64"), parse("dense")], tokens=130)
    assert found.layer < (1e-5 if dtype == torch.float32 else 0.1)
    assert list(found.decode) == ["superlinear:window=64", "dense"]


@pytest.mark.parametrize("damage", ["norm", "conv", "router", "attention", "step"])
def test_a_wrong_one_is_not_timed(folders, damage, monkeypatch):
    model = random_model(str(folders["nemotron-3-nano-30b"]), device="cpu", dtype=torch.bfloat16, native=True)
    blocks = {type(mixer).__name__: mixer for _, mixer in model.native.sublayers}
    change = {
        "norm": ("Mamba", "a", blocks["Mamba"].a * 1.3),
        "conv": ("Mamba", "conv_bias", None),
        "router": ("Experts", "bias", None),
        "attention": ("Attention", "scale", blocks["Attention"].scale * 1.2),
    }.get(damage)
    if change is None:
        mamba = type(blocks["Mamba"])
        step = mamba.step
        monkeypatch.setattr(mamba, "step", lambda self, x, steps: step(self, x, steps) * 1.05)
    else:
        object.__setattr__(blocks[change[0]], *change[1:])
    with pytest.raises(checks.WrongLogitsError):
        checks.check(model, [parse("dense")], tokens=130)


def test_rows_say_what_was_measured(call, tmp_path, capfd):
    given = ("--context", "600,2000", "--whole", "1000", "--attention", "superlinear,dense", "--peers", "transformers")
    code, out, err = call(*given, "--out", str(tmp_path), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert "random weights" in found["of"]["model"] and found["command"].startswith("longspan bench model --model")
    assert [(row["context"], row["attention"]) for row in found["rows"]] == [
        (length, side) for length in (600, 2000) for side in ("superlinear", "dense", "transformers")
    ]
    for row in found["rows"]:
        assert row["prefill_tokens_per_s"] == pytest.approx(row["context"] / row["first_token_s"], rel=1e-3)
        middle, low, high = row["decode_tokens_per_s"]
        assert 0 < low <= middle <= high
        ours = row["attention"] != "transformers"
        assert ("integral" in row["read"]) == (ours and row["context"] == 2000)
        if ours:
            assert row["chunks"][-1][0] == row["context"]
            assert row["fewest"] == min(512, row["context"]) and "prefill" not in row
            assert 0 < row["prefill_floor_share"] < 1 and 0 < row["decode_floor_share"] < 1
    calls = len((tmp_path / "model.jsonl").read_text().splitlines())
    code, again, _ = call(*given, "--out", str(tmp_path), "--json")
    assert code == 0 and json.loads(again)["rows"] == found["rows"]
    assert len((tmp_path / "model.jsonl").read_text().splitlines()) == calls + 1, "nothing is measured twice"
    assert command(["bench", "model", "--merge", str(tmp_path / "model.jsonl")]) == 0
    shown = capfd.readouterr().out
    assert "superlinear" in shown and "The weights are random" in shown and "integral" in shown


@pytest.mark.parametrize("length", [300, 512, 1024, 1100])
def test_nothing_that_is_timed_runs_for_the_first_time(tiny, length, monkeypatch):
    context, calls = run.KVContext(tiny["nemotron-3-nano-30b"], parse("dense")), []
    forward = type(context.model).forward

    def noted(self, tokens, *arguments, **options):
        calls.append((context.length, len(tokens)))
        return forward(self, tokens, *arguments, **options)

    monkeypatch.setattr(type(context.model), "forward", noted)
    read = measure.read_whole(context, length, 0)
    assert context.length == length and [end for end, _ in read.chunks][-1] == length
    starts = [i for i, (at, _) in enumerate(calls) if at == 0]
    timed = calls[starts[-1] :]
    assert [size for _, size in timed] == [min(512, length - at) for at in range(0, length, 512)]
    before = {(at > 0, size) for at, size in calls[: starts[-1]]}
    assert {(at > 0, size) for at, size in timed} <= before
    assert sum(seconds for _, seconds in read.chunks) == pytest.approx(read.seconds)


def test_parts_are_timed_over_filled_pages(tiny):
    model = tiny["nemotron-3-nano-30b"]
    context = run.KVContext(model, parse("dense"))
    told = []
    read = measure.read_parts(context, 3000, [1024, 3000], 0, told.append)
    assert context.length == 3000 and {kv.length for kv in context.layers} == {3000}
    assert [end for end, _ in read.chunks] == [512, 1024, 3000] and len(told) == 3
    real, filled = context.layers[0].keys(0, 512)[0], context.layers[0].keys(600, 2400)[0]
    torch.testing.assert_close(filled.mean(1), real.mean(1), atol=0.25, rtol=0)
    torch.testing.assert_close(filled.std(1), real.std(1), atol=0.1, rtol=0.1)
    assert not torch.equal(filled[:, :512], real)
    assert read.seconds >= sum(seconds for _, seconds in read.chunks[1:])


def test_of_chunks_that_take_long_a_part_is_timed(tiny, monkeypatch):
    monkeypatch.setattr(measure, "_LONG", 1.0)
    monkeypatch.setattr(measure, "_FEWEST", 100)
    context, sizes = run.KVContext(tiny["qwen3-4b"], parse("dense")), []

    def again(context, tokens):
        sizes.append(len(tokens))
        return context.length * len(tokens) * 2e-6

    monkeypatch.setattr(measure, "_again", again)
    read = measure.read_parts(context, 4000, [1100, 2000, 3000, 3500, 4000], 0, lambda _: None)
    assert sizes == [512, 512, 512, 256, 128, 128] and (read.chunk, read.fewest) == (512, 128)
    assert context.length == 4000
    for (end, seconds), size in zip(read.chunks[1:], sizes[1:], strict=True):
        assert seconds == pytest.approx((end - size) * 512 * 2e-6), "what a whole chunk takes"


def test_what_is_timed_is_read_as_documents_are(tiny):
    model, quest = tiny["qwen3-4b"], parse("quest:budget=64,window=16,dense_layers=0")
    tokens = checks.random_tokens(model, 600, 0)
    documents, rehearsed, asked = (run.KVContext(model, quest) for _ in range(3))
    documents.extend(tokens)
    logits = rehearsed.rehearse(tokens)
    asked.step(tokens)
    last = [context.layers[-1].keys(0, 600) for context in (documents, rehearsed, asked)]
    torch.testing.assert_close(last[1], last[0])
    assert not torch.allclose(last[2], last[0], atol=1e-3), "by what answers attend by"
    assert logits.shape == (512,) and rehearsed._committed == 0
    rehearsed.truncate(0)
    assert rehearsed.length == 0 and not rehearsed.tokens


def test_few_batches_of_slow_steps_are_timed(tiny, monkeypatch):
    context, counts = run.KVContext(tiny["qwen3-4b"], parse("dense")), []
    context.extend(checks.random_tokens(context.model, 100, 0))
    monkeypatch.setattr(measure, "_advance", lambda *given: counts.append(given[2]) or 1)
    assert len(measure.decode(context)) == 3 and len(counts) == 1 + measure.BATCHES
    counts.clear()
    monkeypatch.setattr(measure, "_ENOUGH", 0.0)
    measure.decode(context)
    assert counts == [measure.STEPS] * (1 + 3)


def test_fewer_tokens_are_compared_where_memory_is_short(tiny, monkeypatch):
    check, asked = checks.check, []

    def short(model, mechanisms, seed, tokens):
        asked.append(tokens)
        if tokens > 500:
            raise torch.OutOfMemoryError("no room")
        return check(model, mechanisms, seed, 64)

    monkeypatch.setattr(checks, "check", short)
    given = run.Asked((4000,), (parse("dense"),), (), 4000, 0, False, {})
    assert run._checked(tiny["qwen3-4b"], given).tokens == 64 and asked == [2048, 1024, 512, 256]
    monkeypatch.setattr(checks, "check", lambda *_: short(*_[:3], 501))
    with pytest.raises(torch.OutOfMemoryError):
        run._checked(tiny["qwen3-4b"], given)


def test_a_row_says_what_documents_were_read_by(call):
    code, out, err = call("--context", "600", "--attention", "quest,dense", "--json")
    assert code == 0, err
    assert {row["attention"]: row.get("prefill") for row in json.loads(out)["rows"]} == {
        "quest": "dense",
        "dense": None,
    }


def test_the_plan_counts_what_is_held(tiny):
    for name, model in tiny.items():
        context = run.KVContext(model, parse("dense"))
        context.extend(checks.random_tokens(model, 640, 0))
        found = memory_plan.plan(model, parse("dense"), 640, 512)
        held = sum(len(kv.table) * kv.pool.native.page_bytes for kv in context.layers)
        held += sum(kv.mirror.length * kv.pool.native.page_bytes // 128 for kv in context.layers if kv.mirrored)
        assert abs(found.kv - held) < 0.02 * held, name
        assert found.weights == sum(parameter.nbytes for parameter in model.model.parameters())
        assert found.state >= context.recurrence.nbytes and (found.state > 0) == (name == "nemotron-3-nano-30b")
        assert found.total == found.weights + found.kv + found.state + found.workspace


def test_what_does_not_fit_is_refused_with_what_does(tiny):
    model, dense = tiny["nemotron-3-nano-30b"], parse("dense")
    room = memory_plan.plan(model, dense, 100_000, 4096).total
    assert memory_plan.chunk_for(model, dense, 100_000, room) == 4096
    assert memory_plan.check(model, dense, 100_000, room).total <= room
    with pytest.raises(PoolExhaustedError, match=r"tokens fit$") as caught:
        memory_plan.check(model, dense, 10_000_000, room)
    told = str(caught.value)
    fits = int(told.rpartition(": ")[2].split()[0].replace(",", ""))
    assert memory_plan.plan(model, dense, fits, 2048).total <= room
    assert memory_plan.plan(model, dense, fits + 64, 2048).total > room
    assert "\n" not in told and "10,000,000" in told
    with pytest.raises(PoolExhaustedError, match="not even one page"):
        memory_plan.check(model, dense, 640, 1)


def test_wrong_logits_end_the_command(call, monkeypatch):
    layer = checks._layer
    monkeypatch.setattr(checks, "_layer", lambda *given: layer(*given) * 1.1)
    code, out, err = call("--context", "200", "--attention", "dense", "--json")
    assert (code, out) == (1, "")
    assert "away from float32" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--context", "600", "--peers", "nobody"], "unknown peer"),
        (["--context", "600", "--attention", "h2o"], "keeps no whole context"),
        (["--context", "0"], "no length"),
        (["--context", "600", "--minutes", "0"], "leaves no time"),
        ([], "--random-weights is for long contexts"),
    ],
)
def test_bad_arguments_get_one_line(call, arguments, told):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert told in err and len(err.splitlines()) == 1
