"""Parameters and layers of configurations, against transformers' modules on the meta device and models' cards."""

from __future__ import annotations

import pytest

from longspan.errors import ModelError
from longspan.hf.configuration import short
from longspan.planner.families import FAMILIES
from longspan.planner.reading import model, read

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
ROUTED = {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 128}
HYBRID = ["linear_attention", "full_attention"] * 2
PLAIN = (
    "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "granite", "olmo2", "olmo3", "cohere",
    "cohere2", "smollm3", "seed_oss", "glm4", "nemotron", "starcoder2",
)  # fmt: skip
TINY = {
    **dict.fromkeys(PLAIN, SIZES),
    "llama": SIZES | {"attention_bias": True, "mlp_bias": True},
    "mixtral": SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
    "qwen2_moe": SIZES | EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 48},
    "qwen3_moe": SIZES | EXPERTS | {"num_experts": 8, "mlp_only_layers": [1]},
    "olmoe": SIZES | {"num_experts": 8, "num_experts_per_tok": 2},
    "qwen3_next": SIZES | EXPERTS | {
        "num_experts": 8, "shared_expert_intermediate_size": 48, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    },
    "glm4_moe": SIZES | EXPERTS | ROUTED | {"use_qk_norm": True, "head_dim": 16, "attention_bias": True},
    "deepseek_v2": SIZES | EXPERTS | LATENT | ROUTED | {"q_lora_rank": None},
    "deepseek_v3": SIZES | EXPERTS | LATENT | ROUTED | {"q_lora_rank": 24},
    "llama4_text": SIZES | {
        "num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128, "head_dim": 16,
    },
    "falcon": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
        "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": SIZES | {"num_key_value_heads": 4},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2 | {"multi_query": True},
    "nemotron_h": SIZES | EXPERTS | {
        "hybrid_override_pattern": "ME*-", "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 2, "head_dim": 16, "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 48,
    },
    "bamba": SIZES | MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": SIZES | MAMBA | {"mamba_d_ssm": 128, "mamba_rms_norm": True, "head_dim": 16},
    "granitemoehybrid": SIZES | MAMBA | {
        "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 48, "layer_types": HYBRID,
    },
    "jamba": SIZES | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 4, "attn_layer_offset": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
    },
    "lfm2": SIZES | {"full_attn_idxs": [1, 3], "block_multiple_of": 16},
    "lfm2_moe": SIZES | EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_experts": 4,
                                   "num_dense_layers": 1},
}  # fmt: skip


def counted(kind, given):
    """The parameters of transformers' own modules, shared ones once, and its whole configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{key: value for key, value in given.items() if key != "model_type"})
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    made.tie_weights()
    return sum({id(each): each.numel() for each in made.parameters()}.values()), config.to_dict()


@pytest.mark.parametrize("name", short())
def test_catalogue(name):
    entry = short()[name]
    found = model(name)
    assert found.parameters == counted(entry["config"]["model_type"], entry["config"])[0]
    assert found.parameters / 1e9 == pytest.approx(entry["parameters_billion"], rel=1e-3), "the model's card"
    assert found.notes == (), "every family of the catalogue is checked"


@pytest.mark.parametrize("kind", TINY)
def test_families(kind):
    wanted, whole = counted(kind, TINY[kind])
    assert read(kind, {"model_type": kind, **TINY[kind]}).parameters == wanted, "with fields left out"
    assert read(kind, whole).parameters == wanted, "with all fields"


def test_every_family_is_compared():
    unchecked = set(FAMILIES) - set(TINY)
    # Kimi K2 is DeepSeek-V3 by another name; transformers' own Ministral needs more than a size.
    assert unchecked == {"kimi_k2", "ministral"}


@pytest.mark.parametrize(
    "name, active",
    [("qwen3-30b-a3b", 3.04), ("deepseek-v3", 36.6), ("nemotron-3-nano-30b", 3.23), ("mixtral-8x7b", 12.7),
     ("gpt-oss-120b", 5.1), ("qwen3-next-80b-a3b", 3.6)],
)  # fmt: skip
def test_active_parameters_are_those_of_the_cards(name, active):
    assert model(name).active / 1e9 == pytest.approx(active, rel=0.03)


def test_layers():
    nemotron = model("nemotron-3-nano-30b")
    assert (len(nemotron.layers), len(nemotron.attending), len(nemotron.recurrent)) == (52, 6, 23)
    assert not any(each.rotary for each in nemotron.attending)
    assert nemotron.describe() == (
        "52 layers: 6 attention (32/2 heads of 128), 23 recurrent, 23 with 128 experts, 6 a token"
    )
    gemma = model("gemma-3-27b")
    assert [each.window for each in gemma.attending].count(None) == 10
    assert gemma.attending[0].window == 1024 and gemma.attending[5].window is None
    oss = model("gpt-oss-20b")
    assert [each.window for each in oss.attending[:3]] == [128, None, 128]
    scout = model("llama-4-scout")
    assert [each.window for each in scout.attending[:4]] == [8192, 8192, 8192, None]
    assert [each.rotary for each in scout.attending[:4]] == [True, True, True, False]
    assert model("deepseek-v3").attending[0].kept == 576
    assert model("falcon-7b").attending[0].kv_heads == 1
    assert model("qwen2.5-72b").attending[0].kept == 2 * 8 * 128
    assert {each.window for each in model("mistral-7b").attending} == {None}
    assert [layer.experts is None for layer in model("deepseek-v3").layers[:4]] == [True, True, True, False]


def test_windows_that_a_configuration_turns_off_are_none():
    sizes = SIZES | {"model_type": "qwen2", "sliding_window": 32}
    assert {each.window for each in read("q", sizes).attending} == {None}
    on = sizes | {"use_sliding_window": True, "max_window_layers": 3}
    assert [each.window for each in read("q", on).attending] == [None, None, None, 32]
    assert [each.window for each in read("m", SIZES | {"model_type": "mistral", "sliding_window": 9}).attending] == [
        9
    ] * 4


def test_a_model_that_also_sees_is_its_language_model():
    text = SIZES | {"model_type": "llama"}
    found = read("seer", {"model_type": "llava", "text_config": text, "vision_config": {"hidden_size": 9}})
    assert found.parameters == read("reader", text).parameters
    assert "language model alone" in found.notes[0]


def test_an_unknown_family_is_counted_plainly_and_says_so():
    found = read("new", SIZES | {"model_type": "brandnew"})
    assert found.parameters == read("old", SIZES | {"model_type": "llama"}).parameters
    assert "'brandnew'" in found.notes[0]


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"]
)
def test_a_missing_field_is_named(field):
    given = {key: value for key, value in (SIZES | {"model_type": "llama"}).items() if key != field}
    with pytest.raises(ModelError, match=f"'{field}'") as caught:
        read("mine", given)
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"hidden_size": "64"}, "hidden_size"), ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": 1 << 60}, "vocab_size"), ({"num_local_experts": 4}, "num_experts_per_tok"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"layer_types": ["full_attention"]}, "layer_types"), ({"layer_types": ["odd"] * 4}, "'odd'"),
        ({"num_local_experts": 4, "num_experts_per_tok": 9}, "9 of 4"),
        ({"kv_lora_rank": 8}, "qk_nope_head_dim"), ({"is_encoder_decoder": True}, "encoder"),
        ({"model_type": "nemotron_h"}, "hybrid_override_pattern"),
        ({"num_attention_heads": True}, "num_attention_heads"),
    ],
)  # fmt: skip
def test_nonsense_is_named(change, told):
    with pytest.raises(ModelError) as caught:
        read("mine", SIZES | {"model_type": "llama"} | change)
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, [], {}, True, 1 << 39, [[1]], {"a": 1}, 10**30])
@pytest.mark.parametrize("kind", ["lfm2", "nemotron_h", "deepseek_v3", "gpt_oss", "gemma3_text", "qwen3_next"])
def test_any_value_of_any_field_is_read_or_refused_in_a_line(kind, value):
    given = {"model_type": kind, **TINY[kind]}
    for field in (*given, "layer_types", "head_dim", "sliding_window", "mlp_only_layers", "block_ffn_dim_multiplier"):
        try:
            assert read("mine", given | {field: value}).parameters > 0
        except ModelError as error:
            assert "\n" not in str(error)
