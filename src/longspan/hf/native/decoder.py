"""Plain decoders in native blocks: Llama, Qwen3 and Qwen3-MoE.

Each layer is two sublayers, grouped-query attention (Qwen3: with a norm of each head's query and key) and a gated MLP
or gated experts. The weights are those of transformers' modules; matrices that multiply the same tokens become one, of
which the modules' weights are parts.
"""

from __future__ import annotations

from typing import Any

from longspan.hf.native.blocks import Attention, Experts, Mixer, Mlp, Norm
from longspan.hf.native.modules import joined, norm
from longspan.hf.native.stack import Stack
from longspan.kernels.experts import Routing

_FAMILIES = ("llama", "qwen3", "qwen3_moe")


def fits(model: Any) -> bool:
    """Return whether a model is one of these equations, without an option that changes them."""
    config = model.config
    # Some variants scale queries and keys by way of their rotation, which is not made here.
    rotary = getattr(model.base_model, "rotary_emb", None)
    return (
        getattr(rotary, "attention_scaling", 1.0) == 1.0
        and config.model_type in _FAMILIES
        and config.hidden_act == "silu"
        and not getattr(config, "attention_bias", False)
        and not getattr(config, "mlp_bias", False)
        and not (getattr(config, "use_sliding_window", False) and getattr(config, "sliding_window", None))
    )


def stack(model: Any) -> Stack:
    """Return the blocks of a model of these families, which `fits`."""
    base, config = model.base_model, model.config
    sublayers: list[tuple[Norm, Mixer]] = []
    for number, layer in enumerate(base.layers):
        sublayers.append((norm(layer.input_layernorm), _attention(layer.self_attn, config, number)))
        mixer: Mixer = _experts(layer.mlp, config) if hasattr(layer.mlp, "experts") else _mlp(layer.mlp)
        sublayers.append((norm(layer.post_attention_layernorm), mixer))
    return Stack(base.embed_tokens.weight.detach(), sublayers, norm(base.norm), model.lm_head.weight.detach())


def _attention(module: Any, config: Any, ordinal: int) -> Attention:
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    return Attention(
        ordinal,
        joined([module.q_proj, module.k_proj, module.v_proj]),
        module.o_proj.weight.detach(),
        config.num_attention_heads,
        config.num_key_value_heads,
        module.head_dim,
        float(module.scaling),
        *(None if each is None else norm(each) for each in norms),
    )


def _mlp(module: Any) -> Mlp:
    return Mlp(joined([module.gate_proj, module.up_proj]), module.down_proj.weight.detach(), "silu")


def _experts(module: Any, config: Any) -> Experts:
    routing = Routing(top=config.num_experts_per_tok, normalise=config.norm_topk_prob, scores="softmax")
    return Experts(
        module.gate.weight.detach(),
        None,
        routing,
        module.experts.gate_up_proj.detach(),
        module.experts.down_proj.detach(),
        "silu",
    )
