"""One token of each of several sequences through a native model, whose memories lie apart.

Products read the weights once for all of them. A reader attends for each sequence; recurrent states are brought
together for the step and parted after it. Nothing is captured in a graph: `engine/stepper.py` does that for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longspan.hf.attention import Reader
from longspan.hf.native.blocks import Attention
from longspan.hf.native.stack import Stack


class Together:
    """What the blocks of a step find of every sequence (see `blocks.Steps`)."""

    def __init__(self, stack: Stack, reader: Reader, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take the reader of all sequences, and the state of each: by the names of `hf.hybrid`; all have one."""
        self._reader = reader
        self._states: dict[int, tuple[Tensor, Tensor]] = {}
        for block in stack.recurrent:
            conv, recurrent = (
                torch.cat([state[f"{block.layer}.{kind}.0"] for state in states]) for kind in ("conv", "recurrent")
            )
            # Of a convolution's W newest inputs the first is not used.
            self._states[block.layer] = conv[..., 1:].contiguous(), recurrent

    def attend(self, block: Attention, rows: Tensor) -> Tensor:
        """See `blocks.Steps`."""
        heads = rows.view(rows.shape[0], -1, block.head_dim)
        q, k, v = heads.split([block.heads, block.kv_heads, block.kv_heads], 1)
        q, k = block.normed(q, k)
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
        read = self._reader.attend(block.ordinal, q, k, v, block.scale)
        return read.flatten(1)

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `blocks.Steps`."""
        return self._states[layer]

    def leave(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Replace each sequence's state by a copy of what the step left."""
        for layer, (inputs, recurrent) in self._states.items():
            padded = torch.nn.functional.pad(inputs, (1, 0))
            for row, state in enumerate(states):
                state[f"{layer}.conv.0"] = padded[row : row + 1].clone()
                state[f"{layer}.recurrent.0"] = recurrent[row : row + 1].clone()
