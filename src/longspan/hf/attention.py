"""Longspan's attention inside transformers' models, through their own extension point.

transformers looks an attention function up by name and calls it with each layer's queries, keys and values. Ours hands
them to a reader that came along as a keyword of the forward call. Attention and mask are registered together: the mask
is None, since a reader knows what is causal. Position ids are all 0, for which rotation is the identity (times the
scaling that some variants put on cos and sin): queries and keys arrive unrotated, and readers rotate them.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from longspan.errors import ModelError
from longspan.hf import windows

NAME = "longspan"


class Reader(Protocol):
    """What happens to each layer's queries, keys and values during one forward call."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Take the unrotated q `[B, Hq, T, D]`, k and v `[B, Hkv, T, D]` of T new tokens; return `[B, Hq, T, Dv]`.

        Layers are counted from 0 among those that attend: a hybrid model has others.

        May raise `Enough` when the caller needs nothing from this layer on.
        """
        ...


class Enough(Exception):
    """A reader has what it came for: the rest of the forward pass is left out."""


def register() -> None:
    """Register attention and mask with transformers (again is harmless)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: a quadratic tensor is the first thing a long context can't afford."""
    return


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    longspan: Reader | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers expects: `[B, H, T, D]` in, `[B, T, H, Dv]` out."""
    if longspan is None:
        raise ModelError("this model was loaded for Longspan: call it through longspan.LLM")
    family = getattr(getattr(module, "config", None), "model_type", None)
    for unsupported in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(unsupported) is not None and not (unsupported == "sliding_window" and family in windows.SERVED):
            raise ModelError(f"this model's attention uses {unsupported}, which is not supported yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return longspan.attend(int(layer), query, key, value, scale).transpose(1, 2), None
