"""The same weights run by transformers alone, to compare with: as they are, and in float32 one layer after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.hf import attention
from longspan.hf.model import CausalModel


@dataclass(frozen=True)
class Seen:
    """What a layer got and gave in a call."""

    before: Tensor
    """float32 `[T, d]`, the residual stream."""
    after: Tensor
    """What it added, float32 `[T, d]`."""
    named: dict[str, Any]
    """Its other arguments."""


@torch.inference_mode()
def plain_logits(model: CausalModel, tokens: list[int], keep: int) -> Tensor:
    """Return transformers' own float32 logits `[keep, V]` of the last tokens, with its own attention (sdpa)."""
    with plainly(model) as module:
        ids = torch.tensor([tokens], device=model.device)
        out: Tensor = module(ids, use_cache=False, logits_to_keep=keep).logits[0, -keep:].float()
    return out


@torch.inference_mode()
def exact_logits(model: CausalModel, tokens: list[int], keep: int) -> tuple[Tensor, list[Seen]]:
    """Return the same computed in float32 throughout, and what every layer saw.

    Each layer's weights are widened while it runs, and put back.
    """
    base = model.model.base_model
    wide = [*base.layers, *(child for _, child in base.named_children() if child is not base.layers)]
    handles = [hook for module in [*wide, model.model.lm_head] for hook in _widened(module)]
    seen: list[Seen] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        given, found = inputs[0] if inputs else named["hidden_states"], out[0] if isinstance(out, tuple) else out
        rest = {name: x for name, x in named.items() if name != "hidden_states"}
        seen.append(Seen(given[0].float(), found[0] - given[0].float(), rest))

    handles += [layer.register_forward_hook(note, with_kwargs=True) for layer in base.layers]
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            return plain_logits(model, tokens, keep), seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def plain_layer(model: CausalModel, number: int, seen: Seen) -> Tensor:
    """Return what transformers' own layer, in the model's type, adds to what it got: float32 `[T, d]`."""
    with plainly(model) as module:
        given = seen.before.to(model.dtype)
        named = {name: _as(x, model.dtype) for name, x in seen.named.items()}
        out = module.base_model.layers[number](given.unsqueeze(0), **named)
    found: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
    return found.float() - seen.before


@contextmanager
def plainly(model: CausalModel) -> Iterator[Any]:
    """Have transformers run a model's modules with its own attention, for a while."""
    module = model.model
    module.set_attn_implementation("sdpa")
    try:
        yield module
    finally:
        module.set_attn_implementation(attention.NAME)


def _widened(module: nn.Module) -> Iterator[Any]:
    """Let a module's weights, and the floating inputs of its calls, be float32 while it is called."""
    own: list[tuple[nn.Parameter, Tensor]] = []

    def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for parameter in module.parameters():
            own.append((parameter, parameter.data))
            parameter.data = parameter.data.float()
        given = tuple(_as(x, torch.float32) for x in inputs)
        return given, {name: _as(x, torch.float32) for name, x in named.items()}

    def after(*_: Any) -> None:
        for parameter, data in own:
            parameter.data = data
        own.clear()

    yield module.register_forward_pre_hook(before, with_kwargs=True)
    yield module.register_forward_hook(after, always_call=True)


def _as(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, tuple):
        return tuple(_as(each, dtype) for each in x)
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
