"""Steps of one shape, run here without a graph: the same logits and tokens as any other way of decoding."""

import pytest
import torch

from longspan.attention import parse
from longspan.engine import stepper
from longspan.engine.kv_context import KVContext
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.kv.budget import Budget
from tiny_hybrid import save_hybrid
from tiny_llama import WINDOW, save_model

SPECS = ("dense", "superlinear:window=80,spans=2", "superlinear:window=80,spans=2,gate=routed,sinks=4,share=group")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for family in ("nemotron_h", "llama"):
        folder = tmp_path_factory.mktemp(family)
        if family == "llama":
            save_model(folder, max_position_embeddings=WINDOW)
        else:
            save_hybrid(folder, family)
        modules = load(str(folder), device="cpu", dtype=torch.float32)
        made[family] = CausalModel(family, modules.model, modules.tokenizer, native=True), modules
    return made


@pytest.fixture(scope="module")
def tokens():
    return torch.randperm(320, generator=torch.Generator().manual_seed(0)).tolist()


def ordinary(context, token, count):
    """Decode as every context can, step by step, without steps of one shape."""
    context._steps = lambda: None
    said = []
    for _ in range(count):
        token = int(context.step([token]).argmax())
        said.append(token)
    del context._steps
    return said


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_steps_are_the_ordinary_path(models, tokens, family, spec):
    native, modules = models[family]
    one, other = KVContext(native, parse(spec)), KVContext(modules, parse(spec))
    for context in (one, other):
        context.extend(tokens[:190])
    for token in tokens[190:200]:  # over the end of a page
        torch.testing.assert_close(one.step([token]), other.step([token]), atol=2e-4, rtol=2e-4)
    assert one._stepper is not None and other._stepper is None
    assert one.length == other.length == 200 and {kv.length for kv in one.layers} == {200}
    for context in (one, other):
        context.truncate(190)
    torch.testing.assert_close(one.step([7]), other.step([7]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("spec", SPECS[:2])
@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_a_run_reads_the_likeliest_tokens(models, tokens, family, spec, monkeypatch):
    monkeypatch.setattr("longspan.engine.kv_steps.TOGETHER", 16)
    native, _ = models[family]
    one, other = KVContext(native, parse(spec)), KVContext(native, parse(spec))
    for context in (one, other):
        context.extend(tokens[:100])
    assert one.runs
    assert one.run(5, 50) == ordinary(other, 5, 50)
    assert one.tokens == other.tokens and one.length == 150
    one.truncate(100)
    assert one.run(5, 3) == ordinary(other, 5, 0) + other.tokens[101:104]


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_forks_go_their_own_ways(models, tokens, family):
    native, _ = models[family]
    one = KVContext(native, parse("dense"))
    one.extend(tokens[:70])
    one.step([3])
    forks = [one, one.fork(), one.fork()]
    found = [context.run(token, 10) for context, token in zip(forks, (11, 12, 13), strict=True)]
    found = [said + context.run(said[-1], 5) for context, said in zip(forks, found, strict=True)]
    for token, said in zip((11, 12, 13), found, strict=True):
        fresh = KVContext(native, parse("dense"))
        fresh.extend(tokens[:70])
        fresh.step([3])
        assert ordinary(fresh, token, 15) == said


@pytest.mark.parametrize("family", ["nemotron_h", "llama"])
def test_a_saved_context_goes_on(models, tokens, family):
    native, modules = models[family]
    one = KVContext(native, parse("dense"))
    one.extend(tokens[:90])
    said = one.run(5, 9)
    kept = {name: tensor.clone() for name, tensor in one.tensors().items()}
    expected = one.step([said[-1]])
    for model in (native, modules):
        other = KVContext(model, parse("dense"))
        other.restore(one.tokens[:-1], kept)
        torch.testing.assert_close(other.step([said[-1]]), expected, atol=2e-4, rtol=2e-4)


def test_pages_are_made_before_they_are_written(models, tokens, monkeypatch):
    """Steps over many pages, with room for few: tables grow, pools move, nothing is lost."""
    monkeypatch.setattr(stepper, "AHEAD", 1)
    native, _ = models["llama"]
    one, other = KVContext(native, parse("dense")), KVContext(native, parse("dense"))
    for context in (one, other):
        context.extend(tokens[:10])
    assert one.run(5, 200) == ordinary(other, 5, 200)


@pytest.mark.parametrize(
    "spec,options",
    [
        ("quest:budget=128,window=40", {}),
        ("tree:window=80,leaves=4", {}),
        ("superlinear:window=80,summary=bounds", {}),
        ("dense", {"kv_format": "int8"}),
        ("dense", {"budget": Budget(1 << 30, "KV")}),
    ],
)
def test_what_has_no_such_steps_decodes_as_before(models, tokens, spec, options):
    native, _ = models["llama"]
    context = KVContext(native, parse(spec), **options)
    context.extend(tokens[:100])
    assert not context.runs
    context.step([5])
    assert context._stepper is None


def test_an_interrupted_step_is_taken_back(models, tokens, monkeypatch):
    native, _ = models["nemotron_h"]
    one, other = KVContext(native, parse("dense")), KVContext(native, parse("dense"))
    for context in (one, other):
        context.extend(tokens[:90])
        context.step([1])
    with monkeypatch.context() as patch:
        patch.setattr(stepper, "append", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one.step([2])
    assert one.length == 91 and {kv.length for kv in one.layers} == {91}
    torch.testing.assert_close(one.step([2]), other.step([2]), atol=1e-5, rtol=1e-5)
