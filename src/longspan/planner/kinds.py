"""Which kind each layer of a model is, however its configuration says it.

Lists (`layer_types`, `layers_block_type`), patterns (`hybrid_override_pattern`), intervals and indices all become one
`Kind` a layer. It does not know sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longspan.errors import ModelError
from longspan.planner.families import Family
from longspan.planner.fields import Fields

_LETTERS = {"M": "mamba", "E": "moe", "*": "full_attention", "-": "mlp"}
_MIXING = ("mamba", "mamba2", "linear_attention", "conv", "recurrent", "delta_net", "kda")


@dataclass(frozen=True)
class Kind:
    """What one layer does."""

    attends: bool = False
    mixes: bool = False
    """Whether it carries a recurrent state."""
    feeds: bool = True
    """Whether it has a feed-forward part, or experts."""
    experts: bool = False
    window: int | None = None
    """Newest tokens that its attention sees; None: all."""
    alone: str | None = None
    """Set where a layer is one part alone and not a pair of mixer and feed-forward part (Nemotron-H)."""


def layers(fields: Fields, of: Family) -> list[Kind]:
    """Return the kind of every layer (ModelError: a field is missing, or names a kind that nobody knows)."""
    if (pattern := fields.get("hybrid_override_pattern")) is not None:
        return [_alone(fields, _LETTERS.get(letter, letter)) for letter in str(pattern)]
    if fields.kind == "nemotron_h":
        listed = fields.get("layers_block_type", fields.get("layer_types"))
        if not isinstance(listed, list) or not listed:
            raise ModelError(f"the config.json of {fields.name} has no field 'hybrid_override_pattern'")
        return [_alone(fields, str(name)) for name in listed]
    count = fields.whole("num_hidden_layers")
    if count > 10_000:
        raise ModelError(
            f"the field 'num_hidden_layers' of {fields.name}'s config.json is {count}: no model has so many"
        )
    names = _names(fields, of, count)
    return [_pair(fields, number, name) for number, name in enumerate(names)]


def experts(fields: Fields) -> int:
    """Return how many experts a layer has among which each token chooses; 0: none."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if found := fields.get(name):
            return fields.whole(name) if found != 1 else 0
    return 0


def without_positions(fields: Fields, number: int) -> bool:
    """Return whether a layer's keys are not rotated, though other layers' are (NoPE)."""
    if fields.get("position_embedding_type") in ("nope", "none"):
        return True
    listed = fields.get("no_rope_layers")
    if isinstance(listed, list) and number < len(listed):
        return not listed[number]
    every = fields.count("no_rope_layer_interval")
    return bool(every) and (number + 1) % every == 0


def _names(fields: Fields, of: Family, count: int) -> list[str]:
    """Return a word a layer: full_attention, sliding_attention, chunked_attention, both, or a recurrent kind."""
    if fields.kind == "falcon_h1":
        return ["both"] * count
    for name in ("layer_types", "layers_block_type"):
        if listed := fields.each(name, count):
            return [str(each) for each in listed]
    full: Any = None
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if isinstance(indices := fields.get(name), list):
            full = [number in indices for number in range(count)]
    if every := fields.count("full_attention_interval"):
        full = [(number + 1) % every == 0 for number in range(count)]
    if period := fields.count("attn_layer_period"):
        full = [number % period == fields.count("attn_layer_offset") for number in range(count)]
    if full is not None:
        return ["full_attention" if each else "linear_attention" for each in full]
    if fields.kind in ("bamba", "granitemoehybrid"):
        return ["linear_attention"] * count
    if fields.count("attention_chunk_size"):
        every = fields.count("no_rope_layer_interval") or 4
        return ["full_attention" if (number + 1) % every == 0 else "chunked_attention" for number in range(count)]
    every = fields.count("sliding_window_pattern") or of.alternate
    if not fields.count("sliding_window") or not fields.yes("use_sliding_window", fields.kind not in _OPTIONAL):
        return ["full_attention"] * count
    if fields.kind in _OPTIONAL:  # Qwen: the first layers see everything
        first = fields.count("max_window_layers", count)
        return ["full_attention" if number < first else "sliding_attention" for number in range(count)]
    return ["full_attention" if every and (number + 1) % every == 0 else "sliding_attention" for number in range(count)]


_OPTIONAL = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")
"""Families whose windows count only where `use_sliding_window` says so."""


def _pair(fields: Fields, number: int, name: str) -> Kind:
    """Return a layer that is a mixer followed by a feed-forward part."""
    with_experts = _has_experts(fields, number)
    if name == "both":
        return Kind(attends=True, mixes=True, experts=with_experts)
    if name in _MIXING:
        return Kind(mixes=True, experts=with_experts)
    if name in ("sliding_attention", "local_attention"):
        return Kind(attends=True, experts=with_experts, window=fields.whole("sliding_window"))
    if name == "chunked_attention":
        return Kind(attends=True, experts=with_experts, window=fields.whole("attention_chunk_size"))
    if name in ("full_attention", "attention", "global_attention"):
        return Kind(attends=True, experts=with_experts)
    raise ModelError(f"{fields.name} has a layer of kind {name!r}, which the planner does not know")


def _alone(fields: Fields, name: str) -> Kind:
    """Return a layer that is one part alone."""
    found = {
        "mamba": Kind(mixes=True, feeds=False, alone=name),
        "linear_attention": Kind(mixes=True, feeds=False, alone=name),
        "full_attention": Kind(attends=True, feeds=False, alone=name),
        "attention": Kind(attends=True, feeds=False, alone=name),
        "mlp": Kind(alone=name),
        "moe": Kind(feeds=False, experts=True, alone=name),
    }.get(name)
    if found is None:
        raise ModelError(f"{fields.name} has a layer of kind {name!r}, which the planner does not know")
    return found


def _has_experts(fields: Fields, number: int) -> bool:
    """Return whether a layer's feed-forward part are experts."""
    if not experts(fields):
        return False
    if isinstance(listed := fields.get("moe_layers"), list):
        return number in listed
    if number < fields.count("first_k_dense_replace") + fields.count("num_dense_layers"):
        return False
    if isinstance(alone := fields.get("mlp_only_layers"), list) and number in alone:
        return False
    for name in ("decoder_sparse_step", "interleave_moe_layer_step"):
        if (every := fields.count(name)) > 1:
            return (number + 1) % every == 0
    if period := fields.count("expert_layer_period"):
        return number % period == fields.count("expert_layer_offset")
    return True
