"""A transformers model run by Longspan is that model: its logits, whatever the chunks; and what is refused."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from longspan.attention import make, mechanisms, parse
from longspan.errors import ModelError
from longspan.hf.attention import Enough
from longspan.hf.loading import load
from longspan.kv.pages import PagedKV, PagePool
from tiny_llama import SENTENCES, save_model, save_tokenizer

EXACT = [name for name, cls in mechanisms().items() if cls.exact]
EVERYTHING = [
    *EXACT,
    "streaming:window=4096",
    "streaming:window=20,sinks=4096",
    "infini:segment=4096",
    "superlinear:window=4096",
    "superlinear:window=8,spans=1,backward=1000,forward=1000",
    "retrieval:window=4096,read=place",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny(folder):
    return load(str(folder), device="cpu", dtype=torch.float32)


class Reading:
    """Every layer in pages, attended to by a mechanism."""

    def __init__(self, model, mechanism):
        sizes = model.dimensions
        self.mechanism = mechanism
        self.layers = [
            PagedKV(PagePool(sizes.kv_heads, sizes.head_dim, sizes.head_dim, model.dtype, model.device), model.rotary)
            for _ in range(sizes.layers)
        ]

    def attend(self, layer, q, k, v, scale):
        self.layers[layer].append(k, v)
        return self.mechanism.attend(q, self.layers[layer], scale=scale)


def plain_logits(folder, tokens):
    """Logits of every position from transformers alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def assert_same_logits(model, mechanism, expected, tokens, chunk, tolerance=2e-4):
    reader = Reading(model, mechanism)
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        logits = model.forward(tokens[start:stop], reader, logits=stop - start)
        torch.testing.assert_close(logits.double(), expected[start:stop], atol=tolerance, rtol=tolerance)


def test_dense_is_among_the_exact_mechanisms():
    assert "dense" in EXACT


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("spec", EVERYTHING)
def test_logits_are_the_models_own(folder, tiny, spec, chunk):
    tokens = tiny.tokens(SENTENCES * 2)[:150]
    assert len(tokens) == 150
    expected = plain_logits(folder, tokens)
    assert float(expected.std()) > 0.5, "with such weights every attention would look right"
    assert_same_logits(tiny, parse(spec), expected, tokens, chunk)


def test_logits_of_a_short_window_are_others(folder, tiny):
    tokens = tiny.tokens(SENTENCES * 2)[:150]
    expected = plain_logits(folder, tokens)
    with pytest.raises(AssertionError):
        assert_same_logits(tiny, make("streaming", window=20, sinks=0), expected, tokens, 64)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True, "attention_bias": True},
    ],
    ids=["linear", "llama3", "yarn", "mha", "mqa", "tied"],
)
def test_logits_of_variants(tmp_path, config):
    folder = save_model(tmp_path / "variant", **config)
    model = load(str(folder), device="cpu", dtype=torch.float32)
    tokens = model.tokens(SENTENCES)[:100]
    assert_same_logits(model, make("dense"), plain_logits(folder, tokens), tokens, 33)


def test_without_logits_nothing_is_returned_but_everything_read(tiny):
    tokens = tiny.tokens(SENTENCES)[:70]
    reader = Reading(tiny, make("dense"))
    assert tiny.forward(tokens[:60], reader) is None
    assert [kv.length for kv in reader.layers] == [60, 60, 60]
    whole = tiny.forward(tokens, Reading(tiny, make("dense")), logits=1)
    torch.testing.assert_close(tiny.forward(tokens[60:], reader, logits=1), whole, atol=1e-4, rtol=1e-4)


def test_a_reader_that_has_enough_ends_the_forward_pass(tiny):
    seen = []

    class Impatient(Reading):
        def attend(self, layer, q, k, v, scale):
            seen.append(layer)
            if layer == 1:
                raise Enough
            return super().attend(layer, q, k, v, scale)

    for logits in (False, True):
        assert tiny.forward(tiny.tokens("The code"), Impatient(tiny, make("dense")), logits=logits) is None
    assert seen == [0, 1, 0, 1]


def test_queries_and_keys_arrive_unrotated(tiny):
    caught = []

    class Watching(Reading):
        def attend(self, layer, q, k, v, scale):
            if layer == 0:
                caught.append((q, k, v, scale))
            return super().attend(layer, q, k, v, scale)

    token = tiny.tokens("gate")[0]
    tiny.forward([token] * 9, Watching(tiny, make("dense")))
    q, k, v, scale = caught[0]
    assert q.shape == (1, 4, 9, 8) and k.shape == v.shape == (1, 2, 9, 8)
    assert scale == pytest.approx(8**-0.5)
    for tensor in (q, k, v):
        torch.testing.assert_close(tensor, tensor[:, :, :1].expand_as(tensor))


def test_calling_the_model_past_longspan_is_refused(tiny):
    with pytest.raises(ModelError, match=r"longspan\.LLM"):
        tiny.model(torch.tensor([[1, 2, 3]]))


def test_a_fingerprint_follows_the_weights_and_not_the_place(folder, tiny, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    copy = load(str(tmp_path / "copy"), device="cpu", dtype=torch.float32)
    assert copy.fingerprint == tiny.fingerprint
    assert copy.tokenizer_hash == tiny.tokenizer_hash
    assert len(tiny.fingerprint) == 32 and int(tiny.fingerprint, 16) >= 0
    seen = {tiny.fingerprint}
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"):
        copy = load(str(tmp_path / "copy"), device="cpu", dtype=torch.float32)
        matrix = copy.model.get_parameter(name)
        with torch.no_grad():
            matrix.mul_(1.01)
        assert copy.fingerprint not in seen
        seen.add(copy.fingerprint)


def test_a_fingerprint_does_not_depend_on_the_number_type(folder, tiny, tmp_path):
    # Weights that bfloat16 holds, as most checkpoints have them.
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    rounded.save_pretrained(tmp_path / "rounded")
    save_tokenizer(tmp_path / "rounded")
    found = [load(str(tmp_path / "rounded"), device="cpu", dtype=t) for t in (torch.float32, torch.bfloat16)]
    assert found[0].fingerprint == found[1].fingerprint


def test_a_fingerprint_follows_the_rotation(folder, tiny, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 20000.0}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert load(str(tmp_path / "copy"), device="cpu", dtype=torch.float32).fingerprint != tiny.fingerprint


def save_other(folder, kind, **config):
    """A tiny model of another family, with the tokenizer of the tests."""
    import transformers

    save_tokenizer(folder)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    made = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **config})
    getattr(transformers, f"{kind}ForCausalLM")(made).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "kind,config,reason",
    [
        ("Mistral", {"sliding_window": 64}, "sliding"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "dynamic RoPE",
        ),
        ("Cohere", {"pad_token_id": 0}, "rotates"),
    ],
    ids=["mistral", "qwen2", "dynamic", "cohere"],
)
def test_models_that_would_be_run_wrongly_are_refused(tmp_path, kind, config, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        load(save_other(tmp_path / "other", kind, **config), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value)
    assert "other" in str(caught.value)


def test_models_of_another_family_with_full_attention_are_run(tmp_path):
    folder = save_other(tmp_path / "other", "Qwen2", use_sliding_window=False, initializer_range=0.3)
    model = load(folder, device="cpu", dtype=torch.float32)
    tokens = model.tokens(SENTENCES)[:90]
    assert_same_logits(model, make("dense"), plain_logits(folder, tokens), tokens, 40)


def test_offsets_say_where_a_token_stands(tiny):
    text = "The ferry — Fährschiff — leaves at 12 ⛴, 日本 too."
    tokens, offsets = tiny.tokens_with_offsets(text)
    assert tokens == tiny.tokens(text)
    assert len(tokens) == len(offsets)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    assert tiny.decode(tokens) == text
    for (_, end), (start, _) in itertools.pairwise(offsets):
        assert start <= end, "characters between tokens belong to nobody"
    for token, (start, end) in zip(tokens, offsets, strict=True):
        if text[start:end].isascii():
            assert tiny.decode([token]) == text[start:end]


def test_special_tokens_are_neither_added_nor_shown(tiny):
    tokens = tiny.tokens("gate")
    assert tiny.model.config.eos_token_id in tiny.end_tokens
    assert not tiny.end_tokens & set(tokens)
    assert tiny.decode([*tokens, *tiny.end_tokens]) == "gate"


def test_a_conversation_is_written_in_the_models_template(tiny):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert tiny.chat(messages) == "<|system|>Be brief.<|end|><|user|>Where?<|end|><|assistant|>"


def test_a_model_without_a_template_gets_plain_paragraphs(tmp_path):
    model = load(str(save_model(tmp_path / "base", template=None)), device="cpu", dtype=torch.float32)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert model.chat(messages) == "Be brief.\n\nQuestion: Where?\n\nAnswer:"
