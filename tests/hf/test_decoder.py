"""One token without modules: the modules' own results for every kind of plain decoder, and no other kind is taken."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from longspan.attention import make
from longspan.engine.kv_context import KVContext
from longspan.hf import attention, packed
from longspan.hf.attention import Enough
from longspan.hf.decoder import OneToken, _Earlier, fits, tolerance
from longspan.hf.loading import load

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.2,
)
HEADS = (4, 2, 16)
TOKENS = (5, 90, 5, 17, 63)


def model(kind, dtype=torch.float32, **options):
    attention.register()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **options})
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype).eval()
    for name, weight in made.named_parameters():
        if weight.dim() == 1:  # norms and biases that do nothing would hide that they are left out
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    return made


def by_modules(made, token, reader):
    ids = torch.tensor([[token]])
    given = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False, "longspan": reader}
    with torch.inference_mode():
        return made(**given).logits[0].float()


def difference(found, made, tokens=TOKENS):
    """The greatest difference of logits over the greatest logit, token after token."""
    ours, theirs, worst = _Earlier(), _Earlier(), 0.0
    with torch.inference_mode():
        for token in tokens:
            wanted = by_modules(made, token, theirs)
            worst = max(worst, float((found(token, ours, logits=True) - wanted).abs().max() / wanted.abs().max()))
    return worst


@pytest.mark.parametrize(
    "kind,options",
    [
        ("llama", {}),
        ("llama", dict(tie_word_embeddings=True, attention_bias=True)),
        ("mistral", dict(sliding_window=None)),
        ("qwen2", dict(use_sliding_window=False)),
        ("qwen3", dict(use_sliding_window=False)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_modules_result(kind, options, dtype):
    made = model(kind, dtype, **options)
    found = OneToken.of(made, *HEADS)
    assert found is not None
    worst = difference(found, made)
    assert worst < (2e-6 if dtype == torch.float32 else tolerance(dtype))
    # The modules read the same memory, and still multiply several tokens.
    again = difference(OneToken.of(made, *HEADS), made)
    assert again == pytest.approx(worst, abs=1e-6 if dtype == torch.float32 else tolerance(dtype))


def test_the_modules_can_still_be_trained():
    made = model("llama")
    with torch.inference_mode():
        assert OneToken.of(made, *HEADS) is not None
    ids = torch.tensor([[3]])
    given = {"position_ids": torch.zeros_like(ids), "use_cache": False, "longspan": _Earlier()}
    made(input_ids=ids, **given).logits.sum().backward()
    assert all(weight.grad is not None for weight in made.parameters())


@pytest.mark.parametrize(
    "kind,options",
    [
        ("gemma", {}),  # norms by 1 + weight, embeddings scaled
        ("gemma2", {}),  # other modules
        ("granite", dict(residual_multiplier=0.5, embedding_multiplier=3.0)),
        ("olmo2", {}),  # norms behind the products
        ("phi", {}),
    ],
)
def test_other_models_run_by_their_modules(kind, options):
    assert OneToken.of(model(kind, **options), *HEADS) is None


def test_a_subclass_of_linear_knows_better():
    class Own(torch.nn.Linear):
        pass

    made = model("llama")
    assert fits(made)
    made.model.layers[1].mlp.up_proj = Own(64, 96, bias=False)
    assert not fits(made)


def test_scaled_rotations_are_left_to_the_modules():
    made = model("llama")
    made.model.rotary_emb.attention_scaling = 1.2
    assert not fits(made)


def test_a_reader_that_has_enough_ends_it():
    class Stops(_Earlier):
        seen = 0

        def attend(self, layer, *rest):
            self.seen += 1
            if layer == 1:
                raise Enough
            return super().attend(layer, *rest)

    found, reader = OneToken.of(model("llama"), *HEADS), Stops()
    with torch.inference_mode():
        assert found(3, reader, logits=True) is None and reader.seen == 2
        assert found(3, _Earlier(), logits=False) is None


def test_weights_on_a_grid_are_packed():
    if not packed.serves(torch.zeros(16, 32, dtype=torch.bfloat16)):
        pytest.skip("this PyTorch or CPU has no 4-bit product")
    made = model("llama", torch.bfloat16)
    for name, weight in made.named_parameters():
        if "_proj" in name:
            groups = weight.detach().double().unflatten(1, (-1, 32))
            low, high = groups.aminmax(dim=-1, keepdim=True)
            step = (high - low) / 15
            weight.data = (low + ((groups - low) / step).round() * step).flatten(1).bfloat16()
    grid, own, bytes_ = (OneToken.of(made, *HEADS, weights) for weights in ("auto", "own", "int8"))
    assert [layer.qkv.bits for layer in grid._layers] == [4, 4, 4] and bytes_._head.bits == 8
    assert not hasattr(own._layers[0].qkv, "bits") and not hasattr(grid._head, "bits")
    assert difference(grid, made) < tolerance(torch.bfloat16)
    assert difference(bytes_, made) < 2 * tolerance(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_decodes_by_it(folder, dtype, monkeypatch):
    ours = load(str(folder), device="cpu", dtype=dtype)
    plain = load(str(folder), device="cpu", dtype=dtype)
    plain.__dict__["_one_token"] = None
    calls = []
    run = OneToken.__call__
    monkeypatch.setattr(OneToken, "__call__", lambda self, *a, **k: calls.append(a[0]) or run(self, *a, **k))
    logits = []
    for one in (ours, plain):
        context = KVContext(one, make("dense"))
        context.extend(list(range(4, 204)))
        logits.append(torch.stack([context.step([token]) for token in TOKENS]))
    assert calls[-5:] == list(TOKENS) and calls.count(TOKENS[1]) == 1
    close = 1e-5 if dtype == torch.float32 else tolerance(dtype)
    assert float((logits[0] - logits[1]).abs().max() / logits[1].abs().max()) < close


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_few_tokens_and_several_sequences_are_those_of_one_after_another(kind):
    made = model(kind)
    found = OneToken.of(made, *HEADS)
    one, few, rows = _Earlier(), _Causal(), [_Earlier(), _Earlier()]
    with torch.inference_mode():
        wanted = torch.cat([found(token, one, logits=True) for token in TOKENS])
        torch.testing.assert_close(found.few(TOKENS, few, logits=5), wanted, atol=1e-4, rtol=1e-4)
        assert found.few(TOKENS, _Causal(), logits=2).shape[0] == 2 and found.few(TOKENS, _Causal(), logits=0) is None
        for i, token in enumerate(TOKENS):
            beside = found.together((token, TOKENS[-1 - i]), _Beside(rows))
            torch.testing.assert_close(beside[:1], wanted[i : i + 1], atol=1e-4, rtol=1e-4)


class _Causal:
    """A reader that attends causally to the tokens of one call, without positions."""

    def attend(self, layer, q, k, v, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


class _Beside:
    """A reader for each row."""

    def __init__(self, readers):
        self.readers = readers

    def attend(self, layer, q, k, v, scale):
        parts = zip(self.readers, q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([reader.attend(layer, *part, scale) for reader, *part in parts])
