"""What happens in every layer while tokens run through the model: keys go to pages, queries attend by a mechanism.

It does not know when tokens are read or taken back: contexts do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from longspan.attention import Hints, Mechanism, make
from longspan.hf.attention import Enough, Reader
from longspan.hf.trained import Trained
from longspan.kv.pages import PagedKV
from longspan.kv.undisturbed import Undisturbed
from longspan.retrieval.heads import Head, RetrievalHeads


def read_by(mechanism: Mechanism, kv: PagedKV) -> Mechanism:
    """Return by what a layer is read: the context's way of attending, or exactly, where it sees a window of its own."""
    return mechanism if kv.window is None else _newest(kv.window)


@functools.cache
def _newest(window: int) -> Mechanism:
    return make("streaming", window=window, sinks=0)


class Attending:
    """A reader that appends to every layer's pages and attends by the mechanism."""

    def __init__(self, layers: Sequence[PagedKV], mechanism: Mechanism, hints: Hints, trained: Trained) -> None:
        """Take every layer's pages, and what the mechanism is told at every layer."""
        self.layers, self.mechanism, self.hints, self.trained = layers, mechanism, hints, trained

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        kv = self.layers[layer]
        if not kv.append_within(k, v):
            with Undisturbed():
                kv.append(k, v)
        self._look_ahead(layer + 1)
        routing = self.trained.route(layer, q) if self.mechanism.routes else None
        hints = replace(self.hints, layer=layer, gates=self.trained.layer(layer), routing_query=routing)
        return read_by(self.mechanism, kv).attend(q, kv, scale=scale, hints=hints)

    def _look_ahead(self, layer: int) -> None:
        """Have the next layer's pages that will be read brought from below, or from a file, while this one attends."""
        if layer < len(self.layers) and self.mechanism.reads_all:
            self.layers[layer].pool.want()
        if layer < len(self.layers) and (kv := self.layers[layer]).exact:
            if self.hints.chosen_pages:
                kv.prefetch(self.hints.chosen_pages)
            else:
                kv.prefetch(sorted(kv.exact) if self.mechanism.reads_all else None)


class Asked:
    """A reader that also notes the retrieval heads' queries, and stops once it has them all."""

    def __init__(self, reader: Reader, heads: RetrievalHeads) -> None:
        """Take who reads, and whose queries are noted."""
        self.reader, self.heads = reader, heads
        self.last = max(layer for layer, _ in heads.heads)
        self.queries: dict[Head, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `hf.attention.Reader`."""
        for head in self.heads.heads:
            if head[0] == layer:
                self.queries[head] = q[0, head[1]].float() * scale
        if layer == self.last:
            raise Enough
        return self.reader.attend(layer, q, k, v, scale)
