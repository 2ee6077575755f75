"""Which ways to attend, to read documents and to keep pages go together; what does not is refused before reading.

It does not know pages or models: only what mechanisms say of themselves.
"""

from __future__ import annotations

from typing import cast

from longspan.attention import Mechanism, Shape
from longspan.attention.evicting import Evicting
from longspan.errors import UsageError


def check(
    mechanism: Mechanism, prefill: Mechanism | None, shape: Shape, *, adapts: bool, tiered: bool, near: bool = False
) -> None:
    """Refuse what does not go together.

    Args:
        mechanism: by what queries attend.
        prefill: by what documents are read; None: as the mechanism says.
        shape: of a layer.
        adapts: whether cold pages are held as summaries, for a byte budget.
        tiered: whether pages lie below, beyond a byte budget.
        near: whether layers of the model see windows of their own.

    Raises:
        UsageError: the message names the option to change.
    """
    if near and mechanism.evicts:
        raise UsageError(
            f"{mechanism.name} forgets keys in every layer, and layers of this model read windows of their own: give "
            "an attention that keeps everything, such as dense or quest"
        )
    whole = mechanism.evicts and cast("Evicting", mechanism).per_question
    if tiered and not whole and (mechanism.evicts or mechanism.bounded_memory):
        raise UsageError(
            f"{mechanism.name} forgets what it does not keep, and leaves nothing to lie below: leave out --kv-tier, or "
            "give an attention that keeps everything"
        )
    if prefill is None or prefill == mechanism:
        return
    if mechanism.evicts:
        raise UsageError(
            f"{mechanism.name} forgets keys while it reads, and must read documents itself: leave out --prefill"
        )
    if mechanism.memory(shape) or prefill.memory(shape):
        raise UsageError(
            f"{mechanism.name} and --prefill {prefill.name} can't go together: what remembers by more than keys "
            "and values must read documents and questions alike: leave out --prefill"
        )
    if mechanism.bounded_memory and not prefill.bounded_memory:
        raise UsageError(
            f"{mechanism.name} drops what --prefill {prefill.name} would have to read: leave out --prefill, or "
            "give an attention that keeps everything"
        )
    if adapts and not (prefill.adapts or prefill.bounded_memory):
        raise UsageError(
            f"under a KV budget {mechanism.name} holds cold pages as summaries, which --prefill {prefill.name} "
            "can't read: leave out --prefill or --kv-budget"
        )
