"""Forwards for training: any model's hidden states with gradients, and a hybrid's by equations of our own, in batches.

`nemotron_h` runs over its modules' weights: transformers' own Mamba-2 layers write out every state of a chunk
where their kernels are not installed; here the scan is a few products (`kernels/mamba2/parallel.py`), and layers may
be computed again in the backward pass instead of being kept. Attention is whoever's that is handed in, so that the same
weights train under any mechanism.
It does not know losses, tokens' meaning or optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longspan.errors import ModelError
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel
from longspan.kernels.mamba2 import parallel
from longspan.kernels.mamba2.reference import gated_rmsnorm

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer (among those that attend), q `[B, Hq, T, D]`, k and v `[B, Hkv, T, D]`; returns `[B, Hq, T, D]`."""


def new_hybrid(fields: Mapping[str, Any]) -> Any:
    """Return a `nemotron_h` model of transformers of these configuration fields, in float32, initialised to be trained.

    Weights are drawn as PyTorch's global generator says. Time steps begin between 0.001 and 0.1 and decays between 1
    and 16, as Mamba-2 does (arXiv 2405.21060); what joins the residual stream is divided by the root of the sublayers.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from longspan.hf import attention

    attention.register()
    config = NemotronHConfig(**fields)
    model: Any = NemotronHForCausalLM._from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    small = len(config.layers_block_type) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(1.0, 16.0).log_()
            elif name.endswith("dt_bias"):
                steps = torch.empty_like(parameter).uniform_(-6.9, -2.3).exp()
                parameter.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps back
            elif "conv1d" not in name and parameter.dim() == 2 and "embeddings" not in name:
                out = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, (small if out else 1.0) * parameter.shape[1] ** -0.5)
            elif "embeddings" in name:
                parameter.normal_(0.0, 1.0 if not config.tie_word_embeddings else parameter.shape[1] ** -0.5)
        if not config.tie_word_embeddings:
            model.lm_head.weight.mul_(0.1)
    return model


def hidden_states(model: Any, ids: Tensor, attend: Attend, *, again: bool = False) -> Tensor:
    """Return what the head reads, `[B, T, d]`, with gradients.

    Args:
        model: a `NemotronHForCausalLM`, on any device, in any float type (or under autocast).
        ids: int64 `[B, T]`.
        attend: computes attention.
        again: whether each layer is computed again in the backward pass: a fraction of the memory, a third more time.

    Raises:
        ModelError: a layer of a kind that training does not serve.
    """
    h: Tensor = model.base_model.embeddings(ids)
    ordinal = 0
    for layer, kind in zip(model.base_model.layers, model.config.layers_block_type, strict=True):
        if kind == "full_attention":
            step: Callable[[Tensor], Tensor] = _attention(layer, model.config, ordinal, attend)
            ordinal += 1
        elif kind == "linear_attention":
            step = _mamba(layer)
        elif kind == "mlp":
            step = _plain(layer)
        else:
            raise ModelError(
                f"layers of the kind {kind} can't be trained: use linear_attention, full_attention and mlp"
            )
        h = h + (checkpoint(step, h, use_reentrant=False) if again else step(h))
    return model.base_model.norm_f(h)  # type: ignore[no-any-return]


def _plain(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda h: layer.mixer(layer.norm(h))


def _attention(layer: Any, config: Any, ordinal: int, attend: Attend) -> Callable[[Tensor], Tensor]:
    mixer, dim = layer.mixer, config.head_dim

    def step(h: Tensor) -> Tensor:
        x = layer.norm(h)
        q, k, v = (
            project(x).unflatten(-1, (-1, dim)).transpose(1, 2)
            for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        return mixer.o_proj(attend(ordinal, q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    return step


def _mamba(layer: Any) -> Callable[[Tensor], Tensor]:
    mixer = layer.mixer
    inner, shared = mixer.num_heads * mixer.head_dim, mixer.n_groups * mixer.ssm_state_size

    def step(h: Tensor) -> Tensor:
        projected = mixer.in_proj(layer.norm(h))
        gate, mixed, dt = projected.split([inner, inner + 2 * shared, mixer.num_heads], -1)
        x, b, c = F.silu(_convolved(mixed, mixer.conv1d)).split([inner, shared, shared], -1)
        y = parallel.scan(
            x.unflatten(-1, (-1, mixer.head_dim)), dt, -mixer.A_log.float().exp(),
            b.unflatten(-1, (mixer.n_groups, -1)), c.unflatten(-1, (mixer.n_groups, -1)),
            D=mixer.D, dt_bias=mixer.dt_bias, chunk=64,
        )  # fmt: skip
        eps = float(mixer.norm.variance_epsilon)
        normed = gated_rmsnorm(y.flatten(2), gate, mixer.norm.weight, mixer.n_groups, eps)
        return mixer.out_proj(normed)  # type: ignore[no-any-return]

    return step


def _convolved(x: Tensor, conv: Any) -> Tensor:
    """Return a causal convolution of each channel of `[B, T, C]`, as sums of shifted texts.

    cuDNN's gradient of depthwise convolutions takes longer than the rest of a layer.
    """
    weight, tokens = conv.weight.to(x.dtype), x.shape[1]
    padded = F.pad(x, (0, 0, weight.shape[-1] - 1, 0))
    out: Tensor = padded[:, :tokens] * weight[:, 0, 0]
    for i in range(1, weight.shape[-1]):
        out = torch.addcmul(out, padded[:, i : i + tokens], weight[:, 0, i])
    if conv.bias is not None:
        out = out + conv.bias.to(x.dtype)
    return out


def states(model: CausalModel, ids: Tensor, reader: Reader, *, again: bool = False) -> Tensor:
    """Return what the head of any model reads, `[1, T, d]`, with gradients where parameters want them.

    Args:
        model: its own modules run, but for `nemotron_h`'s, which run as above.
        ids: int64 `[1, T]`.
        reader: attends; with `again` it is called twice a layer.
        again: as in `hidden_states`.
    """
    base = model.model.base_model
    if model.config.model_type == "nemotron_h":
        scale = float(model.config.head_dim) ** -0.5
        return hidden_states(model.model, ids, lambda n, q, k, v: reader.attend(n, q, k, v, scale), again=again)
    if model.state_spec:
        raise ModelError(
            f"{model.name} mixes attention with recurrent layers that can't be trained here: nemotron_h can"
        )
    before = base.training
    if again:
        # transformers computes layers again in its training mode alone; there is no dropout to switch on with it.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.train()
    try:
        given = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "use_cache": False, "longspan": reader}
        found: Tensor = base(**given).last_hidden_state
    finally:
        base.train(before)
    return found


def token_losses(model: Any, states: Tensor, ids: Tensor, *, rows: int = 4096) -> Tensor:
    """Return the loss of each next token, `[B, T - 1]`, a few rows' logits in memory at a time.

    Args:
        model: from transformers, with an `lm_head`.
        states: what it reads, `[B, T, d]`.
        ids: int64 `[B, T]`.
        rows: tokens whose logits are computed together.
    """

    def some(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(part).float(), wanted, reduction="none")

    flat, wanted = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = [
        checkpoint(some, flat[i : i + rows], wanted[i : i + rows], use_reentrant=False)
        for i in range(0, wanted.numel(), rows)
    ]
    return torch.cat(parts).view(ids.shape[0], -1)
