"""Teaching a mechanism: losses go down, only what is taught moves, a stopped run goes on as if it had not been."""

import json
from pathlib import Path

import pytest
import torch

from longspan.attention import parse
from longspan.errors import Cancelled, UsageError
from longspan.hf import adapter as adapters
from longspan.hf.loading import load
from longspan.train import convert, extend, loop
from longspan.train.data import Texts, conversations
from longspan.train.optimiser import Rates

SPEC = "superlinear:window=15,spans=1,backward=2.0"
OPTIONS = convert.Options(rank=8, length=256, rows=24, asked=0.0, rate=2e-2)


@pytest.fixture
def fresh(folder):
    return load(str(folder), device="cpu", dtype=torch.float32)


def losses(rows):
    return [row["loss"] for row in rows]


def test_routing_queries_learn_where_dense_attention_looks(tiny, text, tmp_path):
    before = {name: p.detach().clone() for name, p in tiny.model.named_parameters()}
    task = convert.Teach(tiny, parse(SPEC), Texts(tiny, text), OPTIONS)
    rows = loop.train(task, tmp_path, loop.Budget(steps=60), Rates(rest=2e-2, warmup=5), muon=False)
    first, last = rows[:10], rows[-10:]
    assert sum(losses(last)) < 0.9 * sum(losses(first))
    gained = [sum(row["found"] - row["by_query"] for row in part) / len(part) for part in (first, last)]
    # Random weights attend mostly by distance, which no search without positions finds: little is to be gained.
    assert gained[1] > max(0.0, gained[0]), "trained, more of the far mass is found than by the query itself"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in tiny.model.named_parameters())
    assert all(p.abs().max() > 0 for p in task.parameters.values())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tiny, text, tmp_path):
    def task():
        return convert.Teach(tiny, parse(SPEC), Texts(tiny, text), OPTIONS)

    once = loop.train(whole := task(), tmp_path / "once", loop.Budget(steps=8), Rates(), muon=False)
    with pytest.raises(Cancelled, match="behind step 3: the same command goes on"):
        loop.train(task(), tmp_path / "twice", loop.Budget(steps=8), Rates(), muon=False, stop_after=3)
    twice = loop.train(rest := task(), tmp_path / "twice", loop.Budget(steps=8), Rates(), muon=False)
    assert losses(once) == losses(twice) and len(twice) == 8
    assert all(torch.equal(whole.parameters[name], p) for name, p in rest.parameters.items())


def test_a_checkpoint_of_another_training_is_refused(tiny, text, tmp_path):
    texts = Texts(tiny, text)
    loop.train(convert.Teach(tiny, parse(SPEC), texts, OPTIONS), tmp_path, loop.Budget(steps=1), Rates(), muon=False)
    other = convert.Options(rank=8, length=256, rows=24, asked=0.0, rate=2e-2, seed=1)
    with pytest.raises(UsageError, match="another --out"):
        loop.train(convert.Teach(tiny, parse(SPEC), texts, other), tmp_path, loop.Budget(steps=1), Rates(), muon=False)
    (tmp_path / loop.CHECKPOINT).write_bytes(b"no")
    with pytest.raises(UsageError, match="remove it to start again"):
        loop.train(
            convert.Teach(tiny, parse(SPEC), texts, OPTIONS), tmp_path, loop.Budget(steps=1), Rates(), muon=False
        )


def test_gates_learn_how_much_memory_helps(tiny, text, tmp_path):
    task = convert.Teach(tiny, parse("infini:segment=64"), Texts(tiny, text), OPTIONS)
    assert list(task.parameters) == ["gates"]
    rows = loop.train(task, tmp_path, loop.Budget(steps=12), Rates(rest=0.5, warmup=1), muon=False)
    assert sum(losses(rows[-4:])) < sum(losses(rows[:4]))
    assert task.adapter().gates.shape == (3, 4)


@pytest.mark.parametrize("spec", [SPEC, "infini:segment=64", "tree:leaves=1,beam=1,window=16,sinks=0"])
def test_the_models_layers_learn_under_a_mechanism(fresh, text, tmp_path, spec):
    options = convert.Options(lora=4, length=256, asked=0.0)
    task = convert.Adapt(fresh, parse(spec), Texts(fresh, text), options, None)
    own = {name: p.detach().clone() for name, p in fresh.model.named_parameters() if "lora_" not in name}
    loss, _, _ = task.loss(0, 0.0)
    loss.backward()
    reached = {name for name, p in task.parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in task.parameters if name.endswith(".B")}, "A has no gradient while B is zero"
    for p in task.parameters.values():
        p.grad = None
    rows = loop.train(task, tmp_path, loop.Budget(steps=15), Rates(rest=2e-2, warmup=1), muon=False)
    assert sum(losses(rows[-3:])) < 0.9 * sum(losses(rows[:3]))
    assert all(torch.equal(p, own[name]) for name, p in fresh.model.named_parameters() if "lora_" not in name)


def test_a_converted_model_is_the_one_that_was_trained(fresh, folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Budget, "done", lambda self, seconds, steps: steps / 2)
    options = convert.Options(rank=4, lora=2, length=256, asked=0.0, rate=0.1)
    told = []
    made = convert.convert(fresh, parse(SPEC), text, tmp_path / "out", 1.0, options, tell=told.append)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000 and "tokens/s" in told[0]
    found = load(str(folder), device="cpu", dtype=torch.float32, adapter=str(tmp_path / "out"))
    assert found.trained.attention == "superlinear" and len(made.lora) == 3 * 7
    ids = torch.arange(4, 260).unsqueeze(0)
    outs = []
    for model in (fresh, found):  # one has peft's layers, the other merged weights
        from longspan.hf.training import states
        from longspan.train.readers import Learning

        with torch.no_grad():
            outs.append(states(model, ids, Learning(parse(SPEC), model.rotary, made.routing)))
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "out" / adapters.CONFIG).read_text())["about"]["stage"] == "adapt"


def test_a_longer_window_is_taught(fresh, folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Budget, "done", lambda self, seconds, steps: steps / 3)
    for rotation in extend.ROTATIONS:
        out = tmp_path / rotation
        model = load(str(folder), device="cpu", dtype=torch.float32)
        extend.extend(model, text, out, 1.0, extend.Options(8192, rotation, lora=2, length=128, asked=0.0))
        found = load(str(folder), device="cpu", dtype=torch.float32, adapter=str(out))
        assert found.dimensions.window == 8192 and found.rotary.trained_length == 8192
        assert not torch.allclose(found.rotary.inv_freq, fresh.rotary.inv_freq)
        assert found.rotary.inv_freq[-1] < fresh.rotary.inv_freq[-1]
    with pytest.raises(UsageError, match="reads 1024 tokens already"):
        extend.extend(fresh, text, tmp_path / "no", 1.0, extend.Options(1024))


def test_positions_skip_up_to_the_new_window():
    import random

    far, plain = 0, 0
    for seed in range(200):
        at = extend.skipping(random.Random(seed), 100, 5000)
        assert at[0] == 0 and bool((at.diff() >= 1).all()) and int(at[-1]) < 5000
        far, plain = far + (int(at[-1]) > 2500), plain + (int(at[-1]) == 99)
    assert far > 60 and 30 < plain < 75
    assert torch.equal(extend.skipping(random.Random(0), 100, 80), torch.arange(100))


@pytest.mark.parametrize(
    "spec,options,told",
    [
        ("streaming", OPTIONS, "nothing of its own"),
        ("superlinear", OPTIONS, "smaller window"),
        (SPEC, convert.Options(length=1 << 20), "more with --data"),
    ],
)
def test_what_can_not_be_taught_is_refused(tiny, text, tmp_path, spec, options, told):
    with pytest.raises(UsageError, match=told) as caught:
        convert.convert(tiny, parse(spec), text, tmp_path / "out", 1.0, options)
    assert "\n" not in str(caught.value)


def test_questions_stand_behind_the_text_and_their_answers_count(tiny, text):
    texts = Texts(tiny, text)
    example = texts.draw(3, 700, asked=1.0)
    assert example.tokens.numel() <= 700 and example.tokens.shape == example.weights.shape
    answers = tiny.decode(example.tokens[example.weights == 10.0].tolist())
    document = tiny.decode(example.tokens[example.weights == 1.0].tolist())
    assert answers.isdigit() and all(answers[i : i + 5] in document for i in range(0, len(answers), 5))
    assert set(((example.weights == 10.0).nonzero().flatten() - 1).tolist()) <= set(example.rows.tolist())
    assert torch.equal(example.tokens, texts.draw(3, 700, asked=1.0).tokens)


def test_conversations_are_mixed_in_and_only_what_the_assistant_says_counts(tiny, text):
    chats = [[{"role": "user", "content": "Who keeps it?"}, {"role": "assistant", "content": "Lise, at the pier."}]]
    texts = Texts(tiny, text, chats)
    drawn = [texts.draw(seed, 256, asked=0.0) for seed in range(60)]
    talked = [each for each in drawn if (each.weights == 0.0).sum() > 1]
    assert 3 <= len(talked) <= 20
    said = tiny.decode(talked[0].tokens[talked[0].weights == 1.0].tolist())
    assert said.startswith("Lise, at the pier.") and "Who" not in said
    assert all(each.tokens.shape == each.weights.shape and each.tokens.numel() <= 256 for each in talked)
    plain = Texts(tiny, text)
    assert all((plain.draw(seed, 256, asked=0.0).weights == 0.0).sum() == 1 for seed in range(60))


def test_the_packages_conversations_can_be_used():
    found = conversations("own")
    assert len(found) > 20 and all(chat[-1]["role"] == "assistant" for chat in found)


@pytest.mark.parametrize(
    "written", ["", "no", '{"messages": []}', '{"messages": [{"role": "user", "content": "Hello"}]}', "[1]"]
)
def test_what_is_no_conversation_is_refused(tmp_path, written):
    file = tmp_path / "chats.jsonl"
    file.write_text(written)
    for name in (str(file), str(tmp_path / "none")):
        with pytest.raises(UsageError, match="--chat") as caught:
            conversations(name)
        assert "\n" not in str(caught.value)


def test_the_command_says_what_is_wrong(capsys, folder, tmp_path, places):
    from longspan.cli import run

    data = ["--data", str(Path(__file__))]
    out = ["--out", str(tmp_path / "a"), "--model", str(folder), "--device", "cpu", *data]
    assert run(["convert", *out, "--hours", "0"]) == 2
    assert "--hours 0 leaves no time" in capsys.readouterr().err
    assert run(["extend", *out, "--to", "512", "--hours", "0.001"]) == 2
    assert "give a --to above" in capsys.readouterr().err
    assert run(["convert", *out, "--length", "1000000", "--hours", "0.001"]) == 2
    assert "more with --data" in capsys.readouterr().err
