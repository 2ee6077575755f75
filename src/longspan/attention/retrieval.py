"""Retrieval: a few pages, chosen once a question for all layers by the model's own retrieval heads.

Some heads of every language model look up what the current token asks for, wherever it stands (Retrieval Head
Mechanistically Explains Long-Context Factuality, arXiv 2404.15574; Infinite Retrieval, arXiv 2502.12962, chooses by
attention too, window by window). `choose.py` asks those heads, over unrotated keys, and returns pages of 64 tokens.
This file reads them: one softmax over sinks, chosen pages with their neighbours, and the window, each key counted once,
the chosen pages at compact positions directly before the window, in every layer and head alike.

`read="again"` (the default of the engine) does not use this file's attention on the long context at all: the chosen
pages' text is read again, densely, in the model's own window, and only tokens and retrieval heads' keys are kept.
`read="place"` attends to the pages where they lie, through this file, and keeps every layer's KV.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.window import attend_far, attend_window
from longspan.kernels.partial_attention import merge_partials
from longspan.kv.base import PAGE, LayerKV


@dataclass(frozen=True)
class Retrieval(Mechanism):
    """Reads sinks, a window, and the pages that were chosen for the question."""

    pages: int = 4
    """Pages chosen for a question."""
    neighbours: int = 1
    """Pages read on each side of a chosen page."""
    focus: int = 3
    """Sentences of the chosen pages that are read again, the heads' best; 0: the pages whole."""
    window: int = 1024
    """Newest keys that a query sees, its own included."""
    sinks: int = 4
    """First keys of the context that every query sees."""
    read: str = "again"
    """`again`: in the model's own window; `place`: attended to where they lie."""
    lexical: bool = True
    """Whether a lexical index over the same pages (BM25) joins in choosing."""
    quote: bool = True
    """Whether the best sentences are quoted where the answer's own words do not stand in what was read (not where stop
    strings were given)."""

    name: ClassVar[str] = "retrieval"
    about: ClassVar[str] = "a few pages, chosen once a question by the model's retrieval heads"
    source: ClassVar[str] = "arXiv 2404.15574, 2502.12962"
    decode_order: ClassVar[str] = "1 (n once a question)"

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("pages", self.pages, 1)
        at_least("neighbours", self.neighbours, 0)
        at_least("focus", self.focus, 0)
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)
        one_of("read", self.read, ("again", "place"))

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        near = attend_window(q, kv, first, self.window, scale)
        far = attend_far(q, kv, first, self.window, self.far_keys(kv.length, hints.chosen_pages), scale)
        if far is None:
            return near[0]
        return merge_partials(torch.stack([near[0], far[0]]), torch.stack([near[1], far[1]]))[0]

    def far_keys(self, length: int, chosen: tuple[int, ...]) -> Tensor:
        """Return the indexes `[F]` of sinks and chosen pages with their neighbours, ascending, each once."""
        wanted = torch.zeros(length, dtype=torch.bool)
        wanted[: self.sinks] = True
        for page in chosen:
            wanted[max(0, page - self.neighbours) * PAGE : max(0, page + self.neighbours + 1) * PAGE] = True
        return wanted.nonzero().squeeze(1)

    @property
    def wanted_pages(self) -> int:
        """See `Mechanism.wanted_pages`."""
        return self.pages

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`: half for the window, half for the pages."""
        passage = (2 * self.neighbours + 1) * PAGE
        pages = max(1, (keys // 2 - self.sinks) // passage)
        return replace(self, window=max(1, keys - self.sinks - pages * passage), pages=pages)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; one layer's share of the search is that of a single KV head's keys."""
        chosen = self.pages * (2 * self.neighbours + 1) * PAGE
        keys = min(n, self.sinks + chosen + self.window)
        search = 2.0 * n * shape.head_dim * shape.query_heads / shape.kv_heads
        again = self.read == "again"
        return Cost(
            decode_flops=shape.read_flops(keys) + search,
            decode_bytes=keys * shape.token_bytes + n * shape.head_dim * shape.kv_bytes,
            prefill_flops=n * shape.read_flops(min(n, self.sinks + self.window)),
            kept_bytes=n * (shape.head_dim * shape.kv_bytes if again else shape.token_bytes),
            decode_keys=keys,
        )
