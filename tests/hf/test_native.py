"""Native forwards: transformers' logits in any chunking, states by the same names, nothing left of the modules' own."""

import pytest
import torch
import transformers

from longspan.attention import make, parse
from longspan.engine.kv_context import KVContext
from longspan.hf.loading import load, plain_transformers
from longspan.hf.model import CausalModel
from tiny_hybrid import save_hybrid
from tiny_llama import WINDOW, save_model, save_tokenizer

FAMILIES = ("nemotron_h", "llama", "qwen3", "qwen3_moe")
PIECES = ([150], [64, 64, 22], [1, 2, 5, 70, 72], [1] * 150)


def save_qwen3(folder, family):
    fast = save_tokenizer(folder)
    sizes = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
        "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": fast.eos_token_id,
    }  # fmt: skip
    if family == "qwen3_moe":
        sizes |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        config, kind = transformers.Qwen3MoeConfig(**sizes), transformers.Qwen3MoeForCausalLM
    else:
        config, kind = transformers.Qwen3Config(**sizes), transformers.Qwen3ForCausalLM
    torch.manual_seed(3)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(family, fresh=False):
        if fresh or family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family == "nemotron_h":
                # Every layer has some of every tensor that could be taken for another's.
                save_hybrid(folder, family, n_routed_experts=6, n_group=2, topk_group=1, routed_scaling_factor=2.5)
            elif family == "llama":
                save_model(folder, max_position_embeddings=WINDOW)
            else:
                save_qwen3(folder, family)
            modules = load(str(folder), device="cpu", dtype=torch.float32)
            native = CausalModel(family, modules.model, modules.tokenizer, native=True)
            made[family] = native, modules, plain_transformers(modules)
        return made[family]

    return get


@pytest.fixture(scope="module")
def tokens():
    return torch.randperm(320, generator=torch.Generator().manual_seed(0)).tolist()[:200]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pieces", PIECES, ids=["at once", "in chunks", "in pieces", "token by token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(models, tokens, family, pieces):
    native, _, plain = models(family)
    assert native.native is not None
    context, done = KVContext(native, make("dense")), 0
    for size in pieces:
        logits = context.step(tokens[done : done + size])
        done += size
    with torch.inference_mode():
        expected = plain(torch.tensor([tokens[:done]])).logits[0, -1].float()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, expected.mean(), atol=0.1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_pages_are_those_of_the_modules(models, tokens, family):
    native, modules, _ = models(family)
    kept = []
    for model in (native, modules):
        context = KVContext(model, make("dense"))
        context.extend(tokens[:100])
        context.step(tokens[100:103])
        kept.append(context.tensors())
    assert list(kept[0]) == list(kept[1])
    for name, tensor in kept[0].items():
        other = kept[1][name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        read = slice(1 if ".conv." in name else 0, None)  # of W inputs the first is never read again
        torch.testing.assert_close(tensor[..., read].float(), other[..., read].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_read_the_same_memory(models, family):
    native, modules, _ = models(family, fresh=True)  # steps without modules join weights in memory of their own
    stack = native.native
    where = {parameter.untyped_storage().data_ptr() for parameter in modules.model.parameters()}
    weights = [stack.embedding, stack.head]
    for _, mixer in stack.sublayers:
        weights += [x for x in vars(mixer).values() if isinstance(x, torch.Tensor) and x.dim() > 1]
    assert {weight.untyped_storage().data_ptr() for weight in weights} <= where


@pytest.mark.usefixtures("one_thread")
def test_a_reader_that_has_enough_ends_the_forward(models, tokens):
    from longspan.hf.attention import Enough

    class Ends:
        def attend(self, layer, q, k, v, scale):
            raise Enough

    native, modules, _ = models("nemotron_h")
    states = []
    for model in (native, modules):
        state = {}
        assert model.forward(tokens[:9], Ends(), logits=1, state=state) is None
        states.append(state)
    assert states[0].keys() == states[1].keys() and len(states[0]) == 2
    torch.testing.assert_close(states[0]["0.recurrent.0"], states[1]["0.recurrent.0"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family,changed",
    [("nemotron_h", {"use_bias": True}), ("nemotron_h", {"moe_latent_size": 16}), ("llama", {"attention_bias": True})],
)
def test_other_equations_are_run_by_the_modules(tmp_path, family, changed):
    save = save_hybrid if family == "nemotron_h" else lambda folder, _, **config: save_model(folder, **config)
    save(tmp_path, family, **changed)
    modules = load(str(tmp_path), device="cpu", dtype=torch.float32)
    assert CausalModel(family, modules.model, modules.tokenizer, native=True).native is None


def test_adapters_and_quantised_weights_are_left_to_the_modules(models):
    modules = models("llama")[1].model
    layer = modules.model.layers[0].mlp

    class Adapted(torch.nn.Linear):
        pass

    before = layer.down_proj
    layer.down_proj = Adapted(1, 1)
    Adapted.__module__ = "peft.tuners"
    try:
        assert CausalModel("llama", modules, None, native=True).native is None
    finally:
        layer.down_proj = before
    modules.config.quantization_config = {"bits": 4}
    try:
        assert CausalModel("llama", modules, None, native=True).native is None
    finally:
        del modules.config.quantization_config
    assert CausalModel("llama", modules, None, native=True).native is not None


def test_on_a_cpu_modules_run_unless_asked(models):
    assert models("llama")[1].native is None


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "spec", ["superlinear:window=80,spans=2", "quest:budget=128,window=40", "tree:window=80,leaves=4"]
)
@pytest.mark.parametrize("family", ["nemotron_h", "qwen3"])
def test_mechanisms_read_what_the_modules_give_them(models, tokens, family, spec):
    native, modules, _ = models(family)
    outs = []
    for model in (native, modules):
        context = KVContext(model, parse(spec))
        context.extend(tokens[:150])
        outs.append(torch.stack([context.step(tokens[150:170]), context.step(tokens[170:171])]))
    torch.testing.assert_close(*outs, atol=2e-4, rtol=2e-4)
