"""What configurations do not say of a family of models: biases, norms, gates. One entry a family.

Counts that follow are compared with transformers' modules on the meta device (`tests/planner/test_parameters.py`). A
family that has no entry is taken for a plain gated decoder with what its configuration does say (experts, latent
attention, windows), and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What is fixed for all models of one `model_type`."""

    gated: bool = True
    """Whether the feed-forward part has a gate, and so three matrices."""
    bias: bool | str = "attention_bias"
    """Whether queries, keys and values have a bias, or the field that says so."""
    out_bias: bool | str = "attention_bias"
    """The same of the attention's output."""
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool = False
    norm: str = ""
    """Norms of queries and keys: of each `head`, of the `whole`, or none."""
    norms: int = 2
    """Norms of a layer over all numbers of a token."""
    norm_numbers: int = 1
    """Numbers of a norm for each of a token: 2 where it has a bias, 0 where it learns nothing."""
    gate: bool = False
    """Whether queries bring a gate for the attention's output."""
    sinks: bool = False
    """Whether every head has a learned sink."""
    expert_bias: bool = False
    """Whether experts and their router have biases."""
    learned_positions: bool = False
    rotary: bool = True
    mixer: str = "mamba2"
    """What a layer is that neither attends nor is a feed-forward part alone."""
    alternate: int = 0
    """Every how many layers one sees the whole context where a window is given and no list of layers; 0: none does."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields that configurations of this family leave out."""


_PLAIN = Family()
_GPT2 = Family(
    gated=False, bias=True, out_bias=True, mlp_bias=True, norm_numbers=2, learned_positions=True, rotary=False,
    defaults={"tie_word_embeddings": True},
)  # fmt: skip
_BIASED = Family(gated=False, bias=True, out_bias=True, mlp_bias=True, norm_numbers=2)
_TIED = {"tie_word_embeddings": True}

FAMILIES: Mapping[str, Family] = {
    "llama": _PLAIN,
    "mistral": Family(bias=False, out_bias=False, mlp_bias=False),
    "ministral": Family(bias=False, out_bias=False, mlp_bias=False),
    "mixtral": Family(bias=False, out_bias=False, mlp_bias=False),
    "qwen2": Family(bias=True, out_bias=False),
    "qwen2_moe": Family(bias=True, out_bias=False),
    "qwen3": Family(norm="head", defaults={"head_dim": 128}),
    "qwen3_moe": Family(norm="head"),
    "qwen3_next": Family(
        norm="head", gate=True, mixer="delta_net",
        defaults={"head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4},
    ),
    "gemma": Family(defaults=_TIED | {"head_dim": 256}),
    "gemma2": Family(norms=4, alternate=2, defaults=_TIED | {"head_dim": 256, "sliding_window": 4096}),
    "gemma3_text": Family(
        norms=4, norm="head", alternate=6,
        defaults=_TIED | {
            "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "sliding_window": 4096, "max_position_embeddings": 131072,
        },
    ),
    "phi3": Family(bias=False, out_bias=False, mlp_bias=False),
    "phi": Family(gated=False, bias=True, out_bias=True, mlp_bias=True, head_bias=True, norms=1, norm_numbers=2),
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "olmo2": Family(norm="whole"),
    "olmo3": Family(norm="whole"),
    "olmoe": Family(norm="whole"),
    "cohere": Family(norms=1, defaults=_TIED),
    "cohere2": Family(norms=1, alternate=4, defaults=_TIED),
    "smollm3": Family(defaults=_TIED),
    "seed_oss": Family(out_bias="attention_out_bias", defaults={"head_dim": 128, "attention_bias": True}),
    "glm4": Family(norms=4, out_bias=False, defaults={"head_dim": 128, "attention_bias": True}),
    "glm4_moe": Family(out_bias=False, norm="use_qk_norm"),
    "gpt_oss": Family(sinks=True, expert_bias=True, alternate=2, bias=True, out_bias=True),
    "llama4_text": Family(defaults={"num_experts_per_tok": 1, "attention_chunk_size": 8192}),
    "deepseek_v2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "kimi_k2": _PLAIN,
    "falcon": Family(gated=False, bias="bias", out_bias="bias", mlp_bias="bias", norm_numbers=2, defaults=_TIED),
    "nemotron": Family(gated=False, norm_numbers=2),
    "starcoder2": Family(
        gated=False, bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", norm_numbers=2,
        defaults=_TIED | {"use_bias": True},
    ),
    "gpt_neox": Family(
        gated=False, mlp_bias=True, norm_numbers=2, defaults={"attention_bias": True},
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "nemotron_h": Family(gated=False, bias=False, out_bias=False, norms=1, rotary=False, defaults={"conv_kernel": 4}),
    "bamba": Family(defaults={"mamba_d_conv": 4}),
    "falcon_h1": Family(defaults={"mamba_d_conv": 4}),
    "granitemoehybrid": Family(defaults={"mamba_d_conv": 4}),
    "jamba": Family(bias=False, out_bias=False, mlp_bias=False, rotary=False, mixer="mamba1"),
    "lfm2": Family(bias=False, out_bias=False, mlp_bias=False, norm="head", mixer="convolution", defaults=_TIED),
    "lfm2_moe": Family(bias=False, out_bias=False, mlp_bias=False, norm="head", mixer="convolution", defaults=_TIED),
}  # fmt: skip
"""By `model_type`."""


def family(kind: str) -> Family:
    """Return what is known of a family; of an unknown one, that it is plain."""
    return FAMILIES.get(kind, _PLAIN)
