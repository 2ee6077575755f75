"""Nemotron-H in native blocks: Mamba-2, attention without positions, experts with one that is shared.

The weights are those of transformers' modules (`nemotron_h`), which stay as they are: query, key and value rows move
into one matrix, of which the modules' weights become parts. Equations: transformers 5.17 to 5.23, but for the lower
limit of time steps, which is left out here (`hf.hybrid.free_time_steps`).
"""

from __future__ import annotations

from typing import Any

from longspan.hf.native.blocks import Attention, Experts, Mamba, Mixer, Mlp, Norm
from longspan.hf.native.modules import joined, norm
from longspan.hf.native.stack import Stack
from longspan.kernels.experts import Routing


def fits(model: Any) -> bool:
    """Return whether a model is one of these equations, without an option that changes them."""
    config = model.config
    return (
        config.model_type == "nemotron_h"
        and config.mlp_hidden_act == "relu2"
        and config.mamba_hidden_act == "silu"
        and not (config.use_bias or config.mlp_bias or config.attention_bias)
        and getattr(config, "moe_latent_size", None) is None
        and not config.residual_in_fp32
    )


def stack(model: Any) -> Stack:
    """Return the blocks of a `NemotronHForCausalLM`, which `fits`."""
    base, config = model.base_model, model.config
    ordinal = 0
    sublayers: list[tuple[Norm, Mixer]] = []
    for number, layer in enumerate(base.layers):
        kind = config.layers_block_type[number]
        if kind == "full_attention":
            mixer: Mixer = _attention(layer.mixer, config, ordinal)
            ordinal += 1
        elif kind == "linear_attention":
            mixer = _mamba(layer.mixer, number)
        elif kind == "moe":
            mixer = _experts(layer.mixer, config)
        else:
            mixer = _mlp(layer.mixer)
        sublayers.append((norm(layer.norm), mixer))
    return Stack(base.embeddings.weight.detach(), sublayers, norm(base.norm_f), model.lm_head.weight.detach())


def _attention(mixer: Any, config: Any, ordinal: int) -> Attention:
    return Attention(
        ordinal,
        joined([mixer.q_proj, mixer.k_proj, mixer.v_proj]),
        mixer.o_proj.weight.detach(),
        config.num_attention_heads,
        config.num_key_value_heads,
        mixer.head_dim,
        float(mixer.scaling),
    )


def _mamba(mixer: Any, number: int) -> Mamba:
    conv = mixer.conv1d
    return Mamba(
        layer=number,
        in_proj=mixer.in_proj.weight.detach(),
        conv=conv.weight.detach().squeeze(1),
        conv_bias=None if conv.bias is None else conv.bias.detach(),
        a=-mixer.A_log.detach().float().exp(),
        d=mixer.D.detach(),
        dt_bias=mixer.dt_bias.detach(),
        norm=Norm(mixer.norm.weight.detach(), float(mixer.norm.variance_epsilon)),
        out=mixer.out_proj.weight.detach(),
        heads=mixer.num_heads,
        head_dim=mixer.head_dim,
        groups=mixer.n_groups,
        state=mixer.ssm_state_size,
    )


def _experts(mixer: Any, config: Any) -> Experts:
    gate, shared = mixer.gate, mixer.shared_experts
    routing = Routing(
        top=config.num_experts_per_tok,
        groups=config.n_group,
        top_groups=config.topk_group,
        normalise=config.norm_topk_prob,
        scale=float(config.routed_scaling_factor),
    )
    return Experts(
        gate.weight.detach(),
        gate.e_score_correction_bias.detach(),
        routing,
        mixer.experts.up_proj.detach(),
        mixer.experts.down_proj.detach(),
        "relu2",
        (shared.up_proj.weight.detach(), shared.down_proj.weight.detach()),
    )


def _mlp(mixer: Any) -> Mlp:
    return Mlp(mixer.up_proj.weight.detach(), mixer.down_proj.weight.detach(), "relu2")
