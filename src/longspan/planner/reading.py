"""From a config.json to a `Model`: which layers there are, what each keeps, how many parameters it has.

Everything is read from the configuration, nothing from a table of models: MHA, MQA, GQA and MLA, windows of some or all
layers, experts with shared ones, recurrent layers, tied embeddings. A missing field is named (ModelError).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longspan.errors import ModelError
from longspan.hf.configuration import configuration
from longspan.planner import blocks, kinds
from longspan.planner.families import FAMILIES, Family, family
from longspan.planner.fields import Fields
from longspan.planner.model import Attention, Experts, Layer, Model, Recurrent

_MAMBA = (("mamba_num_heads", "mamba_n_heads"), ("mamba_head_dim", "mamba_d_head"), ("ssm_state_size", "mamba_d_state"),
          ("n_groups", "mamba_n_groups"), ("conv_kernel", "mamba_d_conv"))  # fmt: skip
"""Names of Mamba-2's sizes: Nemotron-H's and Bamba's."""


def model(name: str) -> Model:
    """Return a model by name (UnknownNameError, ModelError: see `hf.configuration`, and fields that are missing)."""
    found = configuration(name)
    return read(found.name, found.fields)


def read(name: str, given: Mapping[str, Any]) -> Model:
    """Return the model of a configuration's fields.

    Args:
        name: of the model.
        given: what its config.json holds.

    Raises:
        ModelError: a field is missing or holds nonsense; the message names it.
    """
    fields = Fields(name, given)
    if fields.get("is_encoder_decoder") is True:
        raise ModelError(f"{name} has an encoder beside its decoder: only causal language models can be planned")
    kind = fields.kind
    fields = fields.with_defaults(family(kind).defaults)
    hidden, vocabulary = fields.whole("hidden_size"), fields.whole("vocab_size")
    which = kinds.layers(fields, family(kind))
    layers = [_layer(fields, family(kind), number, what) for number, what in enumerate(which)]
    trained = fields.get("max_position_embeddings")
    trained = trained if isinstance(trained, int) and trained > 0 else None
    positions = (trained or 0) * hidden if family(kind).learned_positions else 0
    tied = fields.yes("tie_word_embeddings", False)
    notes = []
    if kind not in FAMILIES:
        told = f"model type {kind!r} is not among those whose parameters were checked" if kind else "no model_type"
        notes.append(f"{told}: counted as a plain gated decoder with what its configuration says")
    if Fields(name, given).nested:
        notes.append("the language model alone: what it sees or hears with is left out")
    return Model(
        name=name,
        kind=kind,
        hidden=hidden,
        vocabulary=vocabulary,
        layers=layers,
        embedding=vocabulary * hidden + positions,
        head=0 if tied else vocabulary * hidden + (vocabulary if family(kind).head_bias else 0),
        plain=hidden * family(kind).norm_numbers,
        trained=trained,
        notes=tuple(notes),
    )


def _layer(fields: Fields, of: Family, number: int, what: kinds.Kind) -> Layer:
    """Return one layer: attention, state, feed-forward or experts, and norms."""
    hidden = fields.whole("hidden_size")
    counts = [(0, _norms(fields, of, what) * hidden * of.norm_numbers)]
    attention = recurrent = experts = None
    if what.attends:
        count, attention = _attention(fields, of, number, what)
        counts.append(count)
    if what.mixes:
        count, recurrent = _recurrent(fields, of)
        counts.append(count)
    if what.experts:
        count, experts = _experts(fields, of)
        counts.append(count)
    if what.feeds and (width := _width(fields, of, what)):
        counts.append(blocks.feed_forward(hidden, width, gated=of.gated, bias=_said(fields, of.mlp_bias)))
    dense, plain = blocks.add(*counts)
    return Layer(attention, recurrent, experts, dense, plain)


def _said(fields: Fields, what: bool | str) -> bool:
    """Return what a family or, by name, a field says."""
    return fields.yes(what) if isinstance(what, str) else what


def _norms(fields: Fields, of: Family, what: kinds.Kind) -> int:
    if fields.kind == "falcon":
        return 1 if fields.yes("parallel_attn", True) and not fields.yes("new_decoder_architecture") else 2
    return of.norms if of.norms != 2 or what.alone is None else 1


def heads(fields: Fields) -> tuple[int, int, int]:
    """Return query heads, KV heads and numbers of a head."""
    query = fields.whole("num_attention_heads")
    # Where nothing is said, every query head has a KV head (MHA); MQA has a field of its own.
    if fields.yes("multi_query") and not fields.yes("new_decoder_architecture"):
        kv = 1
    else:
        kv = fields.whole("num_kv_heads", fields.whole("num_key_value_heads", query))
    dim = fields.whole("head_dim", fields.whole("attention_head_dim", max(1, fields.whole("hidden_size") // query)))
    if query % kv:
        raise ModelError(f"{fields.name} has {query} query heads for {kv} KV heads: its config.json can't be right")
    return query, kv, dim


def _attention(fields: Fields, of: Family, number: int, what: kinds.Kind) -> tuple[blocks.Count, Attention]:
    hidden, layers = fields.whole("hidden_size"), fields.whole("num_hidden_layers", number + 1)
    sharing = fields.count("num_kv_shared_layers")
    rotary = of.rotary and not fields.yes("alibi") and not kinds.without_positions(fields, number)
    if rank := fields.count("kv_lora_rank"):
        query = fields.whole("num_attention_heads")
        nope, rope, value = (fields.whole(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        ranks = fields.count("q_lora_rank"), rank
        bias = _said(fields, of.bias)
        count = blocks.latent_attention(hidden, query, *ranks, nope, rope, value, bias=bias)
        return count, Attention(query, query, nope + rope, value, what.window, latent=rank + rope, rotary=rotary)
    query, kv, dim = heads(fields)
    norm = ("head" if fields.yes(of.norm) else "") if of.norm.startswith("use") else of.norm
    count = blocks.attention(
        hidden,
        query,
        kv,
        dim,
        bias=_said(fields, of.bias),
        out_bias=_said(fields, of.out_bias),
        gate=of.gate,
        norm=norm,
    )
    shared = bool(sharing) and number >= layers - sharing
    sinks = (0, query if of.sinks else 0)
    return blocks.add(count, sinks), Attention(query, kv, dim, dim, what.window, rotary=rotary, shared=shared)


def _recurrent(fields: Fields, of: Family) -> tuple[blocks.Count, Recurrent]:
    hidden = fields.whole("hidden_size")
    if of.mixer == "delta_net":
        names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        return blocks.delta_net(hidden, *(fields.whole(name) for name in (*names, "linear_conv_kernel_dim")))
    if of.mixer == "convolution":
        kernel = fields.whole("conv_L_cache", 3)
        return blocks.short_convolution(hidden, kernel, bias=fields.yes("conv_bias"))
    if of.mixer == "mamba1":
        inner = fields.whole("mamba_expand", 2) * hidden
        rank = fields.get("mamba_dt_rank", "auto")
        rank = rank if isinstance(rank, int) else -(-hidden // 16)
        bias, conv_bias = fields.yes("mamba_proj_bias"), fields.yes("mamba_conv_bias", True)
        state, kernel = fields.whole("mamba_d_state", 16), fields.whole("mamba_d_conv", 4)
        return blocks.mamba1(hidden, inner, state, rank, kernel, bias=bias, conv_bias=conv_bias)
    count, dim, state, groups, kernel = (fields.whole(first, fields.get(second)) for first, second in _MAMBA)
    bias = fields.yes("use_bias") or fields.yes("mamba_proj_bias")
    conv_bias = fields.yes("use_conv_bias", fields.yes("mamba_conv_bias", True))
    norm = fields.kind != "falcon_h1" or fields.yes("mamba_rms_norm")
    sizes = (count, dim, state, groups, kernel)
    return blocks.mamba2(hidden, *sizes, bias=bias, conv_bias=conv_bias, norm=norm)


def _width(fields: Fields, of: Family, what: kinds.Kind) -> int:
    """Return the numbers inside the feed-forward part that every token takes; 0: there is none."""
    if what.experts:
        return 0
    if fields.kind == "granitemoehybrid" and (width := fields.count("shared_intermediate_size")):
        return width
    if fields.kind == "llama4_text":
        return fields.whole("intermediate_size_mlp", fields.whole("intermediate_size"))
    if fields.kind in ("falcon", "gpt2", "gpt_bigcode"):
        return fields.whole("intermediate_size", 4 * fields.whole("hidden_size"))
    width = fields.whole("intermediate_size")
    if fields.kind == "lfm2" and fields.yes("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3 * fields.factor("block_ffn_dim_multiplier"))
        multiple = fields.whole("block_multiple_of", 256)
        width = -(-width // multiple) * multiple
    return width


def _experts(fields: Fields, of: Family) -> tuple[blocks.Count, Experts]:
    """Return what every token uses of a part with experts (router, shared experts), and the experts."""
    hidden, count = fields.whole("hidden_size"), kinds.experts(fields)
    width = fields.whole("moe_intermediate_size", fields.get("intermediate_size"))
    if fields.kind == "jamba":
        width = fields.whole("intermediate_size")
    top = fields.whole("num_experts_per_tok", fields.get("moe_topk", fields.get("num_experts_per_token")))
    if top > count:
        raise ModelError(f"{fields.name} takes {top} of {count} experts: its config.json can't be right")
    products, plain = blocks.feed_forward(hidden, width, gated=of.gated, bias=of.expert_bias)
    parts: list[blocks.Count] = [(0, hidden * count + (count if of.expert_bias else 0))]
    if shared := _shared(fields, width):
        parts.append(blocks.feed_forward(hidden, shared, gated=of.gated))
        if fields.count("shared_expert_intermediate_size"):
            parts.append((0, hidden))  # what says how much of the shared expert counts
    return blocks.add(*parts), Experts(count, top, products + plain)


def _shared(fields: Fields, width: int) -> int:
    """Return the numbers inside the experts that every token takes, all together."""
    for name in ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"):
        if found := fields.count(name):
            return found
    if fields.kind == "llama4_text":
        return width
    return fields.count("n_shared_experts") * width
