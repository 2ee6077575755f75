"""A haystack as passages, and which of them share most with a question.

Paragraphs where a text has them, else lines, else sentences. It does not know tasks: nothing tells it where a needle
is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SENTENCE_ENDS = re.compile(r"(?<=[.!?]) (?=[A-Z\"'(])")
_FEWEST = 4
"""Passages that a split must give, or a finer one is tried."""


@dataclass(frozen=True)
class Pieces:
    """Passages of a text and what stands between and after them."""

    texts: tuple[str, ...]
    between: str
    end: str
    """White space that ends the text."""

    def joined(self, order: Sequence[int]) -> str:
        """Return the text of these passages in this order."""
        return self.between.join(self.texts[i] for i in order) + self.end

    def at(self, place: int) -> int:
        """Return the passage in which a character of the text stands, or the last one."""
        for i, text in enumerate(self.texts):
            place -= len(text) + len(self.between)
            if place < 0:
                return i
        return len(self.texts) - 1


def split(text: str) -> Pieces:
    """Return the passages of a text: joined in their own order they are the text."""
    body = text.rstrip()
    for between in ("\n\n", "\n"):
        if (parts := body.split(between))[_FEWEST - 1 :]:
            return Pieces(tuple(parts), between, text[len(body) :])
    return Pieces(tuple(sentences(body)), " ", text[len(body) :])


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: joined with spaces they are the text."""
    return _SENTENCE_ENDS.split(text)


def sentence_starts(text: str) -> list[int]:
    """Return where sentences begin, but for the first."""
    return [gap.end() for gap in _SENTENCE_ENDS.finditer(text)]


def best(texts: Sequence[str], question: str, most: int) -> list[int]:
    """Return the passages that share most with a question by BM25, best first; at equal scores the earlier one."""
    from longspan.retrieval.lexical import LexicalIndex  # its libraries take a while to load

    scores = LexicalIndex(list(texts)).scores(question)
    ranked = sorted(range(len(texts)), key=lambda i: (-scores[i], i))
    return [i for i in ranked[:most] if scores[i] > 0]
