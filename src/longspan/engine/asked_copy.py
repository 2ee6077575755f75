"""A copy of kept layers on which one question is read, evicts, and is answered; the document's own layers stay whole.

Pages are shared until the copy writes. It does not know contexts: they say when a question begins and ends.
"""

from __future__ import annotations

from longspan.engine.kept_layers import KeptLayers
from longspan.hf.attention import Reader
from longspan.kv.budget import Budget


class AskedCopy:
    """What the layers hold for one question and its answer."""

    def __init__(self, kept: KeptLayers, count: int, length: int) -> None:
        """Begin a question of `count` tokens after `length` others (PoolExhaustedError: as `KeptLayers.fork`)."""
        self.layers = kept.asked(count, length)
        self.until = 0
        """Tokens of the context once the question was read and has evicted; before that 0."""

    @property
    def nbytes(self) -> int:
        """Bytes that the copy refers to, pages that it still shares with the document among them."""
        return sum(kv.nbytes for kv in self.layers.layers)

    def reader(self) -> Reader:
        """Return what reads the question's tokens, which say what matters, or the answer's, which do not."""
        return self.layers.reader(learn=not self.until)

    def evict(self, length: int) -> None:
        """Evict once the question was read, at a context of `length` tokens (errors: as `KeptLayers.finish`)."""
        for kv in self.layers.layers:
            kv.commit()
        self.layers.finish(length, 0)
        self.until = length

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, none of the question's once it has evicted."""
        for kv in self.layers.layers:
            kv.truncate(min(length, kv.length))

    def fork(self, budget: Budget) -> AskedCopy:
        """Return another copy that goes its own way (PoolExhaustedError: as `KeptLayers.fork`)."""
        other = AskedCopy.__new__(AskedCopy)
        other.layers, other.until = self.layers.fork(budget), self.until
        return other

    def free(self) -> None:
        """Give every page back."""
        for kv in self.layers.layers:
            kv.free()
