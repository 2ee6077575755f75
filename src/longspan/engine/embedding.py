"""Texts as vectors by the model's own states: what a dense index compares.

A text's vector is the mean of the residual stream behind one layer over the text's tokens, the first one left out: it
is a sink, whose state is many times larger than all others' and says nothing. Texts are read side by side in one call,
each attending to itself alone, and the layers above are never run. Nothing is trained and nothing more is loaded;
models that were trained to compare texts do it better. It does not know what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longspan.engine.contexts import CHUNK, GPU_CHUNK
from longspan.hf.model import CausalModel

_SHARE = 0.3
"""Of the layers, behind which states are taken: see docs/experiments.md."""
_MOST = 512
"""Tokens of a text that are read: passages are shorter."""


class Embedder:
    """Makes vectors of texts."""

    def __init__(self, model: CausalModel, layer: int | None = None) -> None:
        """Take a model whose layers all attend, and the layer behind which states are taken; None: `_SHARE` of them."""
        self.model = model
        self.layer = max(1, round(_SHARE * model.dimensions.layers)) if layer is None else layer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors of texts, float32 `[texts, D]` on the CPU; an empty text's is that of an end token."""
        end = min(self.model.end_tokens, default=0)
        told = [self.model.tokens(text)[:_MOST] or [end] for text in texts]
        most = GPU_CHUNK if self.model.device.type == "cuda" else CHUNK
        found: list[Tensor] = []
        done = 0
        while done < len(told):
            count, longest = 1, len(told[done])
            # Padded to the longest of them.
            while done + count < len(told) and (count + 1) * max(longest, len(told[done + count])) <= most:
                longest = max(longest, len(told[done + count]))
                count += 1
            found += self._together(told[done : done + count])
            done += count
        size = self.model.config.hidden_size
        return torch.stack(found).cpu() if found else torch.empty(0, size)

    def _together(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = [len(text) for text in texts]
        states = self.model.states([token for text in texts for token in text], _Apart(self.model, lengths), self.layer)
        return [each[1:].mean(0) if len(each) > 1 else each[0] for each in states.split(lengths)]


@dataclass
class _Apart:
    """A reader that lets each of several texts attend to itself alone, from position 0 on."""

    model: CausalModel
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        device = self.model.device
        at = torch.arange(max(self.lengths), device=device)
        self._there = at < torch.tensor(self.lengths, device=device).unsqueeze(1)  # [texts, longest]
        self._positions = at.expand_as(self._there)[self._there]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rotary, window = self.model.rotaries[layer], self.model.windows[layer]
        if rotary is not None:
            q, k = (rotary(x, self._positions) for x in (q, k))
        q, k, v = (self._padded(x) for x in (q, k, v))
        if window is None or window >= q.shape[2]:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
            out = scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        # Padding comes last in every text: causal attention never looks at it.
        return out.transpose(1, 2)[self._there].transpose(0, 1).unsqueeze(0)

    def _padded(self, x: Tensor) -> Tensor:
        """Return `[1, H, T, D]` as `[texts, H, longest, D]`."""
        padded = x.new_zeros(*self._there.shape, x.shape[1], x.shape[3])
        padded[self._there] = x[0].transpose(0, 1)
        return padded.transpose(1, 2)
