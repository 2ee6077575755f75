"""A whole native model: embedding, sublayers one after another, last norm, head.

It reads many tokens of one sequence, or steps with one token of each sequence of a batch (`blocks.py`). It does not
know families of models, sampling, or graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from longspan.hf.attention import Enough
from longspan.hf.native.blocks import Attention, Mamba, Mixer, Norm, Run, Steps, wide_product


@dataclass(frozen=True)
class Stack:
    """The weights of a model, as its forward uses them."""

    embedding: Tensor
    """`[V, d]`."""
    sublayers: Sequence[tuple[Norm, Mixer]]
    norm: Norm
    head: Tensor
    """`[V, d]`."""

    @property
    def attending(self) -> list[Attention]:
        """The sublayers that attend, in order."""
        return [mixer for _, mixer in self.sublayers if isinstance(mixer, Attention)]

    @property
    def recurrent(self) -> list[Mamba]:
        """The sublayers that keep a state, in order."""
        return [mixer for _, mixer in self.sublayers if isinstance(mixer, Mamba)]

    def read(self, ids: Tensor, run: Run, *, logits: int = 0) -> Tensor | None:
        """Run tokens int64 `[T]` through the sublayers.

        Args:
            ids: their ids.
            run: what layers remember.
            logits: of how many last tokens logits are wanted.

        Returns:
            float32 `[logits, V]`, or None where none are wanted or the reader had enough.
        """
        h: Tensor = self.embedding[ids]
        mixed: Tensor | None = None
        try:
            for norm, mixer in self.sublayers:
                x, h = norm(h) if mixed is None else norm(mixed, h)
                mixed = mixer.read(x, run)
                del x
        except Enough:
            return None
        if not logits:
            return None
        assert mixed is not None, "a model has sublayers"
        x, _ = self.norm(mixed[-logits:].contiguous(), h[-logits:].contiguous())
        return wide_product(x, self.head)

    def step(self, ids: Tensor, steps: Steps) -> Tensor:
        """Run one token of each sequence, int64 `[B]`; returns float32 logits `[B, V]`."""
        h = self.embedding[ids]
        mixed: Tensor | None = None
        for norm, mixer in self.sublayers:
            x, h = norm(h) if mixed is None else norm(mixed, h)
            mixed = mixer.step(x, steps)
        assert mixed is not None, "a model has sublayers"
        return wide_product(self.norm(mixed, h)[0], self.head)
