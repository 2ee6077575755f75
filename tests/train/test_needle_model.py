"""The needle model: sequences say what they claim, a tiny one learns to copy, engine and trainer agree on it."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

from longspan.attention import parse
from longspan.engine import prompts
from longspan.engine.kv_context import KVContext
from longspan.errors import Cancelled, ModelError, UsageError
from longspan.hf.loading import load
from longspan.hf.training import hidden_states
from longspan.sessions.session import Turn
from longspan.train import loop
from longspan.train.needle import __main__ as command
from longspan.train.needle import evaluate, learn, tasks
from longspan.train.needle.recipe import RECIPES, SIZES, Phase, Recipe, Size, named, shorter
from longspan.train.optimiser import Rates
from longspan.train.readers import dense

HAY = b"The harbour board met in May, and nobody had asked for a lantern. " * 40


def words(tokens):
    return "".join(chr(t) if t < 256 else f"<{t}>" for t in tokens)


def named_in(made, asked):
    """Return the name that a question asks for, and what stands behind it."""
    question = words(made.tokens[: asked.start]).rpartition(f"<{tasks.ASK}>")[2]
    return question[:5], question[5:]


@pytest.mark.parametrize("seed", range(12))
def test_every_answer_follows_from_the_text(seed):
    made = tasks.make(seed, 600, HAY, tasks.Mix())
    assert made.tokens[0] == tasks.START and len(made.tokens) <= 600 and made.asked
    text = words(made.tokens[1 : made.text])
    for asked in made.asked:
        answer, end = words(asked.answer[:-1]), asked.answer[-1]
        assert end == tasks.END and tuple(made.tokens[asked.start : asked.start + len(asked.answer)]) == asked.answer
        name, sign = named_in(made, asked)
        told = [part.split(";")[0] for part in text.split(f" {name}{sign}")[1:]]
        assert (sign == "+=") == (asked.kind == "values")
        if asked.kind == "none":
            assert answer == "none" and not told
        elif asked.kind == "chain":
            links = answer.split("=")
            assert told == [links[0]] and all(f" {a}={b};" in text for a, b in itertools.pairwise(links))
        else:
            assert answer == ",".join(sorted(told)) and (len(told) == 1) == (asked.kind == "key")
            assert len({code[0] for code in told}) == len(told), "what comes next can be told from what was said"


def test_sequences_follow_from_their_seeds():
    first, again, other = (tasks.make(seed, 300, HAY, tasks.Mix()) for seed in (1, 1, 2))
    assert first == again and first != other
    long = tasks.make(3, 5000, HAY * 3, tasks.Mix(most_facts=4), questions=6)
    assert long.text == 5000 and len(long.asked) == 6


def test_nothing_is_asked_twice():
    for seed in range(6):
        made = tasks.make(seed, 2000, HAY, tasks.Mix(asked=1000, density=0.1))
        names = [named_in(made, asked)[0] for asked in made.asked]
        assert made.text == 1000 and len(set(names)) == len(names) > 0


def tiny_recipe(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", Size("M*", 64, 2, 1, 32, 16))
    return Recipe("tiny", (Phase(1.0, 64, 32),), batch=512, rates=Rates(warmup=5))


def test_a_tiny_model_learns(monkeypatch, tmp_path):
    recipe = tiny_recipe(monkeypatch)
    task = learn.Learn(recipe, HAY, torch.device("cpu"))
    rows = loop.train(task, tmp_path, loop.Budget(steps=40), recipe.rates)
    assert sum(r["loss"] for r in rows[-3:]) < 0.7 * sum(r["loss"] for r in rows[:3])
    assert all(p.grad is None for p in task.parameters.values())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path):
    recipe, budget = tiny_recipe(monkeypatch), loop.Budget(steps=12)

    def task():
        return learn.Learn(recipe, HAY, torch.device("cpu"))

    once = loop.train(task(), tmp_path / "once", budget, recipe.rates)
    with pytest.raises(Cancelled):
        loop.train(task(), tmp_path / "two", budget, recipe.rates, stop_after=5)
    rows = loop.train(task(), tmp_path / "two", budget, recipe.rates)
    assert [r["loss"] for r in rows] == [r["loss"] for r in once]


def test_what_searches_is_saved_with_the_model(monkeypatch, tmp_path):
    recipe = tiny_recipe(monkeypatch)
    recipe = replace(recipe, phases=(Phase(1.0, 128, 64, segments=(0, 32), searching=0.3, sparse=0.5),), rank=4)
    task = learn.Learn(recipe, HAY, torch.device("cpu"))
    rows = loop.train(task, tmp_path / "run", loop.Budget(steps=6), recipe.rates)
    assert all(0 <= row["found"] <= 1 for row in rows)
    task.save(tmp_path / "m", task.identity)
    model = load(str(tmp_path / "m"), device="cpu", adapter=str(tmp_path / "m" / learn.ROUTED))
    assert model.adapter.attention == "superlinear:sinks=4" and len(model.adapter.routing) == 1
    assert torch.equal(model.adapter.routing[0].up, task.parameters["routing.0.up"].detach())
    assert model.adapter.routing[0].up.abs().max() > 0, "it moved from the query itself"


def test_a_run_begins_with_the_weights_of_an_earlier_one(monkeypatch, tmp_path):
    recipe, cpu = tiny_recipe(monkeypatch), torch.device("cpu")
    task = learn.Learn(recipe, HAY, cpu)
    task.save(tmp_path / "m", task.identity)
    other = learn.Learn(replace(recipe, seed=1), HAY, cpu, start=tmp_path / "m")
    for name, parameter in other.parameters.items():
        kept = task.parameters[name]
        assert torch.equal(parameter, kept if name.startswith("routing") else kept.bfloat16().float())
    monkeypatch.setitem(SIZES, "tiny", Size("M*", 32, 2, 1, 32, 16))
    for folder in (tmp_path / "m", tmp_path / "none"):
        with pytest.raises(ModelError, match="no model of this recipe's size") as caught:
            learn.Learn(recipe, HAY, cpu, start=folder)
        assert "\n" not in str(caught.value)


def test_the_engine_answers_as_the_trainer_does(monkeypatch, tmp_path):
    task = learn.Learn(tiny_recipe(monkeypatch), HAY, torch.device("cpu"))
    task.save(tmp_path / "m", task.identity)
    model = load(str(tmp_path / "m"), device="cpu", dtype=torch.float32)
    text = "naïve <b> \n"
    assert model.tokens(text) == list(text.encode()) and model.decode(list(text.encode())) == text
    assert model.tokens("<|ask|>ab=") == [tasks.ASK, 97, 98, 61] and model.end_tokens == {tasks.END}
    assert prompts.before_documents(model) == [tasks.START]
    turns = [Turn("nopek+", "1132,4829")]
    first, then = [tasks.ASK, *b"nopek+="], [*b"1132,4829", tasks.END, tasks.ASK, *b"sulim="]
    assert prompts.after_documents(model, "nopek+", []) == first
    assert prompts.after_documents(model, "sulim", turns) == [*first, *then]
    assert prompts.plain(model, "sulim", []) == [tasks.ASK, *b"sulim="]
    rng = random.Random(0)
    tokens = [tasks.START, *(rng.randrange(97, 123) for _ in range(150))]
    context = KVContext(model, parse("dense"))
    context.extend(tokens[:-1])
    found = context.step(tokens[-1:])
    with torch.no_grad():
        states = hidden_states(model.model, torch.tensor([tokens]), lambda _, q, k, v: dense(q, k, v, 32**-0.5, None))
        wanted = model.model.lm_head(states)[0, -1]
    torch.testing.assert_close(found.flatten(), wanted, atol=2e-4, rtol=1e-3)
    groups = list(evaluate.evaluate(model, [parse("dense"), parse("streaming")], [200], HAY, texts=1, questions=2))
    assert [group[-1].kind for group in groups] == ["all", "all"] and [g[-1].count for g in groups] == [2, 2]
    assert [group[0].attention for group in groups] == ["dense", "streaming"]
    late = evaluate.evaluate(model, [parse("dense")], [200], HAY, until=0.0)
    assert list(late) == [], "no text is begun after that time"


def test_an_answer_is_right_where_greedy_decoding_gives_it(monkeypatch, tmp_path):
    task = learn.Learn(tiny_recipe(monkeypatch), HAY, torch.device("cpu"))
    task.save(tmp_path / "m", task.identity)
    model = load(str(tmp_path / "m"), device="cpu", dtype=torch.float32)
    context = KVContext(model, parse("dense"))
    context.extend([tasks.START, *HAY[:100]])
    question, said = [tasks.ASK, *b"nopek="], []
    decoding = context.fork()
    logits = decoding.step(question)
    for _ in range(4):
        said.append(int(logits.argmax()))
        logits = decoding.step(said[-1:])
    assert evaluate._told(context.fork(), question, said)
    assert not evaluate._told(context.fork(), question, [*said[:2], said[2] ^ 1, said[3]])


def test_the_command_measures_and_says_what_is_wrong(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "installed", lambda: HAY)
    task = learn.Learn(tiny_recipe(monkeypatch), HAY, torch.device("cpu"))
    task.save(tmp_path / "m", task.identity)
    asked = ["eval", "--model", str(tmp_path / "m"), "--lengths", "100,200", "--texts", "2", "--questions", "1"]
    assert command.main([*asked, "--device", "cpu", "--json", "--out", str(tmp_path / "found.json")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "found.json").read_text()) == told
    fifths = [sum(count for _, count in line["depths"]) for line in told["lines"] if line["kind"] != "none"]
    assert all(count > 0 for count in fifths) and all(line["texts"] == 2 for line in told["lines"])
    assert told["text"] == len(HAY) and told["trained"] == task.identity and told["device"]
    assert [(line["length"], line["count"]) for line in told["lines"] if line["kind"] == "all"] == [(100, 2), (200, 2)]
    assert command.main(["train", "--recipe", "great", "--minutes", "1", "--out", str(tmp_path / "no")]) == 2
    assert "use small or needle" in capsys.readouterr().err


def test_recipes_are_whole():
    for recipe in RECIPES.values():
        untils = [phase.until for phase in recipe.phases]
        assert untils == sorted(untils) and untils[-1] == 1.0
        for phase in recipe.phases:
            assert all((phase.length - phase.asked) % segment == 0 for segment in phase.segments if segment)
        assert recipe.phase(0.0) is recipe.phases[0] and recipe.phase(1.0) is recipe.phases[-1]
    assert [named("small", 0, 0.5).phase(done).length for done in (0.0, 0.49, 1.0)] == [256, 256, 512]
    with pytest.raises(UsageError, match="leave nothing"):
        named("small", 0, 0.5, 0.5)
    assert max(phase.length for phase in shorter(named("needle", 3), 4096).phases) == 4096
    with pytest.raises(UsageError, match="use small or needle"):
        named("great", 0)


def test_intervals_hold_the_share():
    low, high = evaluate.wilson(9, 10)
    assert 0.59 < low < 0.6 and 0.98 < high < 0.99
    assert evaluate.wilson(0, 5)[0] == 0.0 and evaluate.wilson(5, 5)[1] == 1.0
