"""Layers with windows and positions of their own (Gemma-3), and layers of experts (Qwen3-MoE), in the engine."""

import pytest
import torch
import transformers
from recurrent import EVERYTHING, HEADS, close, new, plain_next

from longspan.engine.embedding import _Apart
from longspan.errors import ModelError, UsageError
from longspan.hf.loading import load, plain_transformers
from longspan.hf.model import CausalModel
from tiny_llama import WINDOW, save_tokenizer

OWN = 70
"""Keys that a near layer of the tiny Gemma-3 sees: more than a page, and no multiple of one."""
NEAR, FAR = "sliding_attention", "full_attention"
PIECES = ([300], [128, 128, 44], [1, 63, 2, 70, 100, 64], [200, *[1] * 100])


def save(folder, family, **fields):
    fast = save_tokenizer(folder)
    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
        "initializer_range": 0.25, "bos_token_id": None, "pad_token_id": 0, "eos_token_id": fast.eos_token_id,
    }  # fmt: skip
    if family == "Gemma3":
        sizes |= {"sliding_window": OWN, "layer_types": [NEAR, FAR, NEAR, NEAR, FAR], "query_pre_attn_scalar": 12}
        sizes["rope_parameters"] = {
            FAR: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            NEAR: {"rope_type": "default", "rope_theta": 100.0},
        }
        made = transformers.Gemma3TextConfig(**{**sizes, **fields})
    else:
        sizes |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        made = transformers.Qwen3MoeConfig(**{**sizes, **fields})
    torch.manual_seed(4)
    model = getattr(transformers, f"{family}ForCausalLM")(made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """By family: the model by transformers' modules, transformers alone; and for experts our own forward."""
    made = {}
    for family in ("Gemma3", "Qwen3Moe"):
        folder = save(tmp_path_factory.mktemp(family), family)
        model = load(str(folder), device="cpu", dtype=torch.float32)
        made[family] = model, plain_transformers(model)
    model, plain = made["Qwen3Moe"]
    made["Qwen3Moe, our own"] = CausalModel("own", model.model, model.tokenizer, native=True), plain
    return made


@pytest.fixture(scope="module")
def some():
    return torch.randint(0, 320, (400,), generator=torch.Generator().manual_seed(0)).tolist()


BOTH = ("Gemma3", "Qwen3Moe", "Qwen3Moe, our own")


@pytest.mark.parametrize("pieces", PIECES, ids=["at once", "in chunks", "in pieces", "token by token"])
@pytest.mark.parametrize("family", BOTH)
def test_logits_are_those_of_transformers(mixed, some, family, pieces):
    model, plain = mixed[family]
    context, done = new(model), 0
    for size in pieces:
        logits = context.step(some[done : done + size])
        done += size
    close(logits, plain_next(plain, some[:done]))


@pytest.mark.parametrize("family", BOTH)
def test_forks_and_files_go_on_alike(mixed, some, family):
    model, plain = mixed[family]
    context = new(model)
    context.extend(some[:250])
    fork, other = context.fork(), new(model)
    other.restore(context.tokens, {name: tensor.clone() for name, tensor in context.tensors().items()})
    context.step(some[300:340])
    context.truncate(250)
    expected = plain_next(plain, some[:260])
    for each in (context, fork, other):
        close(each.step(some[250:260]), expected)
        each.truncate(250)
    context.truncate(40)
    close(context.step(some[40:60]), plain_next(plain, some[:60]))


def test_each_layer_has_its_own_window_and_positions(mixed):
    model = mixed["Gemma3"][0]
    assert model.windows == (OWN, None, OWN, OWN, None)
    near, far = model.rotaries[0], model.rotaries[1]
    assert model.rotary is far and (near.trained_length, far.trained_length) == (None, WINDOW)
    assert far.inv_freq[0] == pytest.approx(1 / 8) and near.inv_freq[0] == 1.0


@pytest.mark.parametrize("spec", EVERYTHING)
def test_a_way_of_attending_is_for_layers_that_see_everything(mixed, some, spec):
    model, plain = mixed["Gemma3"]
    context = new(model, spec)
    context.extend(some[:301])
    for token in some[301:309]:
        context.step([token])
    close(context.step(some[309:310]), plain_next(plain, some[:310]))


@pytest.mark.parametrize("spec", ["streaming:window=20,sinks=4", "superlinear:window=40,spans=2", "infini:segment=64"])
def test_what_a_near_layer_sees_is_not_dropped(mixed, some, spec):
    model = mixed["Gemma3"][0]
    by_chunks, by_pieces = new(model, spec), new(model, spec)
    by_chunks.extend(some[:300])
    for start in range(0, 300, 50):
        by_pieces.extend(some[start : start + 50])
    expected = by_chunks.step(some[300:320])
    for token in some[300:319]:
        by_pieces.step([token])
    close(by_pieces.step(some[319:320]), expected)
    start, stop = by_pieces.dropped(by_pieces.length)
    assert stop <= 320 - OWN + 1 and (start < stop) == (not spec.startswith("superlinear"))
    assert all(kv.memory is None for kv in by_pieces.layers if kv.window)


def test_an_index_holds_the_keys_that_layers_have(mixed, some):
    model = mixed["Gemma3"][0]
    index, whole = new(model, "retrieval:window=1000"), new(model)
    index.extend(some)
    whole.extend(some)
    assert index.heads == HEADS
    for (layer, head), keys in zip(index.slots, index.index, strict=True):
        close(keys[: len(some)].float(), whole.layers[layer].keys(0, len(some))[0, head], 4e-3)


def test_texts_longer_than_a_window_are_embedded_by_what_layers_see(mixed, some):
    model, plain = mixed["Gemma3"]
    found = model.states(some[:150], _Apart(model, [150]), 4)
    with torch.inference_mode():
        expected = plain(torch.tensor([some[:150]]), output_hidden_states=True).hidden_states[4][0]
    close(found, expected)


def test_a_budget_keeps_what_near_layers_see(mixed, monkeypatch):
    context = new(mixed["Gemma3"][0], "tree")
    before = context._needs(300, 1).window
    monkeypatch.setattr(context.model, "windows", (before + 1, None, 5, 5, None))
    assert context._needs(300, 1).window >= before + 1


def test_what_can_not_be_is_refused(mixed, tmp_path):
    model = mixed["Gemma3"][0]
    with pytest.raises(UsageError, match="windows of their own"):
        new(model, "h2o:budget=128,window=64")
    folder = save(tmp_path / "near", "Gemma3", layer_types=[NEAR] * 5)
    with pytest.raises(ModelError, match="no layer of"):
        load(str(folder), device="cpu", dtype=torch.float32)
    folder = save(tmp_path / "both", "Gemma3", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="sliding"):
        load(str(folder), device="cpu", dtype=torch.float32)
