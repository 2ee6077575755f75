"""Sentences of a text, and which of them the retrieval heads look at.

A page of 64 tokens is cut where it happens to be cut; a sentence means something by itself. A small model answers from
the few sentences that its own heads rank best, and is led astray by what stands around them (docs/experiments.md).
Where a sentence ends is judged by punctuation and blank lines alone: no language's abbreviations are known.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n\s*\n")
_LEAST, _MOST, _REACH = 25, 600, 300
"""Characters: shorter pieces join the next, longer ones are cut, and how far a cut sentence is followed."""


@dataclass(frozen=True)
class Sentence:
    """A sentence `text[start:end]` of one document, and the share of attention that fell on it."""

    document: int
    start: int
    end: int
    mass: float


def split(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Return the sentences that touch `text[start:end]`, whole ones: first character and the one after the last."""
    low, high = max(0, start - _REACH), min(len(text), end + _REACH)
    cuts = [low, *(match.end() for match in _END.finditer(text, low, high)), high]
    found, begin = [], low
    for _, cut in itertools.pairwise(cuts):
        if cut - begin < _LEAST and cut != high:
            continue
        for piece in range(begin, cut, _MOST):
            a, b = piece, min(piece + _MOST, cut)
            a, b = a + len(text[a:b]) - len(text[a:b].lstrip()), b - len(text[a:b]) + len(text[a:b].rstrip())
            if a < b and a < end and b > start:
                found.append((a, b))
        begin = cut
    return found


def rank(
    mass: Tensor, offsets: Sequence[tuple[int, int]], first: int, document: int, spans: Sequence[tuple[int, int]]
) -> list[Sentence]:
    """Return sentences of one document with the attention that fell on their tokens.

    Args:
        mass: `[tokens]` of this document alone, float.
        offsets: for each token of the session, its first character and the one after its last.
        first: the document's first token in `offsets`.
        document: the document's number.
        spans: the sentences.
    """
    last = first + mass.shape[0]
    found = []
    for start, end in spans:
        # By the tokens' ends: a token often begins with the space before its word.
        a = bisect.bisect_right(offsets, start, first, last, key=lambda offset: offset[1])
        b = bisect.bisect_right(offsets, end, a, last, key=lambda offset: offset[1])
        found.append(Sentence(document, start, end, float(mass[a - first : b - first].sum())))
    return found
