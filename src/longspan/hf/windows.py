"""Layers that see a window of their own, at positions of their own: Gemma-3's mix of near and far views.

Some layers of such a model attend to their newest W keys alone, and rotate by another base than the layers that see
everything. A context's way of attending is for the latter; the former read their window exactly (`engine/readers.py`).
A family is served once a tiny model of it agrees with transformers (`tests/engine/test_windows.py`). It does not know
pages, nor when what no layer sees any more is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.errors import ModelError
from longspan.kv.rotary import Rotary

SERVED = ("gemma3_text",)
"""Families (`model_type`) whose layers' windows and rotations are read here."""
_NEAR, _FAR = "sliding_attention", "full_attention"


def windows(name: str, config: Any, layers: int) -> tuple[int | None, ...]:
    """Return how many of the newest keys each layer that attends sees; None: all of them.

    Raises:
        ModelError: windows that are not served, or no layer that sees everything.
    """
    if not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True):
        return (None,) * layers
    if config.model_type not in SERVED or getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{name} attends in sliding windows of its own: not supported yet")
    kinds: Sequence[str] = config.layer_types
    if _FAR not in kinds:
        raise ModelError(f"no layer of {name} sees beyond its window: there is nothing that Longspan could read longer")
    return tuple(int(config.sliding_window) if kind == _NEAR else None for kind in kinds)


def rotaries(module: Any, trained: int) -> dict[str, Rotary]:
    """Return how each kind of layer rotates, by its name in transformers.

    Args:
        module: the model's rotary embedding, which has frequencies for each kind.
        trained: positions that the model was trained on; within a window no distance is ever longer than that.
    """
    found = {kind: getattr(module, f"{kind}_inv_freq", None) for kind in (_FAR, _NEAR)}
    lengths = {_FAR: trained, _NEAR: None}
    return {kind: Rotary(freq, lengths[kind]) for kind, freq in found.items() if freq is not None}


def kind_of(window: int | None) -> str:
    """Return transformers' name for a layer with this window."""
    return _FAR if window is None else _NEAR
