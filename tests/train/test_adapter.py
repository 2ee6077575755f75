"""Adapters: written and read again, merged into weights, refused where they belong to another model."""

import json

import pytest
import torch

from longspan import LLM
from longspan.errors import ModelError
from longspan.hf import adapter as adapters
from longspan.hf import routing
from longspan.hf.adapter import Adapter
from longspan.hf.loading import load
from longspan.hf.routing import Routing
from tiny_llama import save_model

TEXT = "The harbour board met in May. The code of the gate is 7315. Lise keeps the spare key. " * 12
SPEC = "superlinear:window=15,spans=1,backward=1.0"


def full(model, **more):
    """An adapter with everything that one can hold."""
    sizes, source = model.dimensions, torch.Generator().manual_seed(1)
    width = sizes.query_heads * sizes.head_dim
    routes = tuple(
        Routing(torch.randn(2, width, generator=source), torch.randn(width, 2, generator=source))
        for _ in range(sizes.layers)
    )
    name = "model.layers.1.self_attn.q_proj"
    lora = {name: (torch.randn(3, 32, generator=source), torch.randn(32, 3, generator=source))}
    gates = torch.randn(sizes.layers, sizes.query_heads, generator=source)
    given = {"attention": SPEC, "routing": routes, "gates": gates, "lora": lora, "about": {"seed": 3}}
    return Adapter(model.fingerprint, **given | more)


def test_what_is_saved_is_read_again(tiny, tmp_path):
    made = full(tiny, window=4096)
    made.save(tmp_path / "a")
    found = adapters.read(tmp_path / "a")
    assert (found.model, found.attention, found.window, found.about) == (tiny.fingerprint, SPEC, 4096, {"seed": 3})
    assert found.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_loading_merges_weights_and_changes_the_identity(tiny, folder, tmp_path):
    made = full(tiny)
    made.save(tmp_path / "a")
    adapted = load(str(folder), device="cpu", dtype=torch.float32, adapter=str(tmp_path / "a"))
    name = "model.layers.1.self_attn.q_proj"
    down, up = made.lora[name]
    before, after = (m.model.get_submodule(name).weight for m in (tiny, adapted))
    torch.testing.assert_close(after, before + up @ down)
    other = "model.layers.0.self_attn.q_proj"
    assert torch.equal(adapted.model.get_submodule(other).weight, tiny.model.get_submodule(other).weight)
    assert adapted.trained.attention == "superlinear" and torch.equal(adapted.trained.gates, made.gates)
    prints = {tiny.fingerprint, adapted.fingerprint}
    for changed in ({"lora": {}}, {"lora": {}, "routing": None}):
        full(tiny, **changed).save(tmp_path / "b")
        prints.add(load(str(folder), device="cpu", dtype=torch.float32, adapter=str(tmp_path / "b")).fingerprint)
    assert len(prints) == 4, "sessions of one are not those of another"


def test_the_engine_searches_by_routing_queries(tiny, folder, tmp_path, places):
    def logits(adapter):
        llm = LLM(str(folder), None if adapter else SPEC, "cpu", torch.float32, adapter=adapter)
        assert llm.attention.describe() == SPEC, "an adapter attends as it was trained to"
        context = llm.new_context(llm.attention)
        tokens = llm.model.tokens(TEXT)
        context.extend(tokens[:200])
        return context.step(tokens[200:201])

    plain = logits(None)
    zero = routing.begin(3, 32, 2, torch.Generator().manual_seed(0))
    full(tiny, routing=tuple(zero), lora={}, gates=None).save(tmp_path / "zero")
    assert torch.equal(logits(str(tmp_path / "zero")), plain), "untrained, the query itself searches"
    full(tiny, lora={}, gates=None).save(tmp_path / "trained")
    assert not torch.allclose(logits(str(tmp_path / "trained")), plain)


def test_evals_ask_a_model_with_an_adapter_as_it_was_trained(tiny, folder, tmp_path, places, capsys):
    from longspan.cli import run

    full(tiny).save(tmp_path / "a")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    asked = ["--model", str(folder), "--lengths", "256", "--questions", "1", "--device", "cpu", "--dtype", "float32"]
    asked += ["--haystack", str(tmp_path / "text.txt")]
    for more in ([], ["--adapter", str(tmp_path / "a")], ["--adapter", str(tmp_path / "a"), "--attention", "dense"]):
        assert run(["eval", "passkey", *asked, *more, "--out", str(tmp_path / "rows")]) == 0
        capsys.readouterr()
    lines = (tmp_path / "rows" / "passkey.jsonl").read_text().splitlines()
    found = [(row["mechanism"], row["fingerprint"]) for row in map(json.loads, lines) if "fingerprint" in row]
    assert len(set(found)) == 3 and len({fingerprint for _, fingerprint in found}) == 2
    assert "superlinear" in found[1][0] and found[2][0] == "dense"


def test_decode_steps_that_search_by_queries_are_not_used(tiny, folder, tmp_path):
    from longspan.attention import parse
    from longspan.engine.kv_context import KVContext
    from longspan.engine.stepper import Stepper
    from longspan.hf.model import CausalModel

    native = CausalModel(
        "tiny", load(str(folder), device="cpu", dtype=torch.float32).model, tiny.tokenizer, native=True
    )
    context = KVContext(native, parse(SPEC))
    assert Stepper.serves(native, context.layers, parse(SPEC)) and Stepper.serves(
        native, context.layers, parse("dense")
    )
    native.trained = native.trained.adapted(full(tiny), "a", 3, 4, 8)
    assert not Stepper.serves(native, context.layers, parse(SPEC))
    assert Stepper.serves(native, context.layers, parse("dense"))


def test_another_models_adapter_is_refused(tiny, tmp_path):
    other = save_model(tmp_path / "other", seed=5, max_position_embeddings=1024)
    full(tiny).save(tmp_path / "a")
    with pytest.raises(ModelError, match="trained on other weights") as caught:
        load(str(other), device="cpu", dtype=torch.float32, adapter=str(tmp_path / "a"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil,told",
    [
        (lambda place: (place / adapters.CONFIG).unlink(), "holds no adapter.json"),
        (lambda place: (place / adapters.CONFIG).write_text("[]"), "another format"),
        (lambda place: (place / adapters.CONFIG).write_text("{"), "can't be read"),
        (lambda place: (place / adapters.WEIGHTS).write_bytes(b"no"), "can't be read"),
        (lambda place: (place / adapters.WEIGHTS).unlink(), "can't be read"),
    ],
)
def test_a_folder_that_is_none_is_refused(tiny, tmp_path, spoil, told):
    full(tiny).save(tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(ModelError, match=told) as caught:
        adapters.read(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_shape_is_refused(tiny):
    with pytest.raises(ModelError, match="other layers or heads"):
        tiny.trained.adapted(full(tiny, routing=full(tiny).routing[:2]), "a", 3, 4, 8)
    with pytest.raises(ModelError, match=r"does not fit this model at model\.layers\.9"):
        adapters.merge(full(tiny, lora={"model.layers.9.q": (torch.zeros(1, 1), torch.zeros(1, 1))}), tiny.model, "a")


def test_an_adapter_trained_over_another_holds_both(tiny, folder, tmp_path):
    first, second = full(tiny, window=4096, routing=None), full(tiny, gates=None)
    name, other = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"
    second.lora[other] = (torch.ones(1, 32), torch.ones(48, 1))
    both = second.over(first)
    assert both.window == 4096 and both.routing is second.routing and torch.equal(both.gates, first.gates)
    both.save(tmp_path / "both")
    found = load(str(folder), device="cpu", dtype=torch.float32, adapter=str(tmp_path / "both"))
    (d1, u1), (d2, u2) = first.lora[name], second.lora[name]
    before = tiny.model.get_submodule(name).weight
    torch.testing.assert_close(found.model.get_submodule(name).weight, before + u1 @ d1 + u2 @ d2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.model.get_submodule(other).weight, tiny.model.get_submodule(other).weight + 1)
    assert second.over(None) is second
