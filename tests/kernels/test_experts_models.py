"""Mixtures of experts are those of the models that have them, as transformers computes these, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronHConfig, Qwen3MoeConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from longspan.kernels.experts import Routing, mixture


def drawn(module, seed=0):
    """The module in float64, every weight and buffer drawn: an expert chosen wrongly or a bias left out is seen."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in (*module.parameters(), *module.buffers()):
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64) / one.shape[-1] ** 0.5)
    return module


def tokens(width):
    return torch.randn(40, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("groups,top_groups,normalise", [(1, 1, True), (4, 2, True), (2, 1, False)])
@torch.no_grad()
def test_nemotron_h(groups, top_groups, normalise):
    config = NemotronHConfig(
        hidden_size=24, layers_block_type=["moe"], n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=20,
        moe_shared_expert_intermediate_size=28, n_group=groups, topk_group=top_groups, norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    layer, x = drawn(NemotronHMoE(config)), tokens(24)
    gate, chosen, shared = layer.gate, layer.experts, layer.shared_experts
    found = mixture(
        x, x @ gate.weight.T, gate.e_score_correction_bias, chosen.up_proj, chosen.down_proj,
        routing=Routing(3, groups, top_groups, normalise, 2.5), activation="relu2",
        shared=(shared.up_proj.weight, shared.down_proj.weight),
    )  # fmt: skip
    torch.testing.assert_close(found, layer(x.unsqueeze(0))[0], atol=1e-5, rtol=1e-5)  # its router is float32


@torch.no_grad()
def test_qwen3_moe():
    config = Qwen3MoeConfig(hidden_size=24, num_experts=12, num_experts_per_tok=3, moe_intermediate_size=20)
    config._experts_implementation = "eager"
    layer, x = drawn(Qwen3MoeSparseMoeBlock(config)), tokens(24)
    found = mixture(
        x, x @ layer.gate.weight.T, None, layer.experts.gate_up_proj, layer.experts.down_proj,
        routing=Routing(3, normalise=config.norm_topk_prob, scores="softmax"), activation="silu",
    )  # fmt: skip
    torch.testing.assert_close(found, layer(x.unsqueeze(0))[0], atol=1e-5, rtol=1e-5)  # its softmax is float32
