"""Tiny models that mix attention with recurrent layers, one a family, saved as transformers saves models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tiny_llama import WINDOW, save_tokenizer

_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": (
        "NemotronH",
        {
            "layers_block_type": [
                "linear_attention", "mlp", "full_attention", "linear_attention", "moe", "full_attention",
            ],
            "head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
            "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16, "rescale_prenorm_residual": False,
        },
    ),
    "bamba": ("Bamba", {"attn_layer_indices": [1, 3], **_MAMBA2}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {**_LINEAR, **_MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16,
         "position_embedding_type": "rope", "initializer_range": 0.12},
    ),
    "falcon_h1": ("FalconH1", {**_MAMBA2, "num_hidden_layers": 3, "head_dim": 8, "mamba_d_ssm": 64}),
    "lfm2": ("Lfm2", _CONV),
    "lfm2_moe": ("Lfm2Moe", {**_CONV, **_EXPERTS, "num_dense_layers": 1}),
    "olmo_hybrid": ("OlmoHybrid", {**_LINEAR, **_DELTA}),
    "qwen3_next": (
        "Qwen3Next",
        {**_LINEAR, **_DELTA, **_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16,
         "initializer_range": 0.12},
    ),
    # Not served: its layers do not continue from a state when several tokens come at once.
    "jamba": (
        "Jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1,
         "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
}  # fmt: skip
"""By model type: the name of transformers' classes, and what its configuration has beyond the sizes of all. Weights are
smaller where half a unit in the last place of the inputs would move logits by 1e-4 and more."""


def save_hybrid(folder: Path, family: str, *, seed: int = 1, **config: Any) -> Path:
    """4 query heads, 2 KV heads of 8; two layers that attend (in falcon_h1 all three) and two that recur."""
    name, own = FAMILIES[family]
    fast = save_tokenizer(folder)
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW,
        "initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": fast.eos_token_id,
    }  # fmt: skip
    made = getattr(transformers, f"{name}Config")(**{**sizes, **own, **config})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(made)
    with torch.no_grad():
        # As families begin them, these are all alike: nothing would show if one were taken for another.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
