"""Has a context repeated behind itself, for mechanisms that evict by what the repetition looks at.

The model reads the context's own tokens once more, piece by piece, each after an instruction to repeat and the last
tokens before it. A piece is taken back before the next one comes: all that stays is what the mechanism learned. It does
not know what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from longspan.engine.kept_layers import KeptLayers
from longspan.errors import PoolExhaustedError
from longspan.hf.model import CausalModel
from longspan.kv.undisturbed import Undisturbed

INSTRUCTION = "\n\nRepeat the previous context:\n\n"
"""What stands before a piece."""
LEAD = 8
"""Last tokens before a piece, which say where it begins."""


def repeat(
    model: CausalModel,
    kept: KeptLayers,
    tokens: Sequence[int],
    start: int,
    chunk: int,
    state: Callable[[], dict[str, Tensor]],
) -> int:
    """Repeat a context from one token on.

    Args:
        model: that read it.
        kept: its layers, whose tokens are all committed.
        tokens: of the whole context.
        start: the first to be repeated.
        chunk: tokens that run through the layers together.
        state: returns a hybrid model's state after them all.

    Returns:
        The token before which all was repeated: not the last, where neither positions nor bytes hold a piece.
    """
    instruction = model.tokens(INSTRUCTION)
    while start < len(tokens):
        lead = [*instruction, *tokens[max(0, start - LEAD) : start]]
        room = min(chunk, model.dimensions.window - kept.held) - len(lead)
        if room < 1:
            break
        piece = tokens[start : start + room]
        try:
            model.forward([*lead, *piece], kept.repeating(), state=state())
        except PoolExhaustedError:
            break
        finally:
            with Undisturbed():
                kept.take_back(len(tokens))
        start += len(piece)
    return start
