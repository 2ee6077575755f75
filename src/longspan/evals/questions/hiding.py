"""Needles put into haystacks: among lines, or between the sentences of prose that is cut to size by words.

It does not know what a needle says.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Sequence

from longspan.evals.questions import pieces

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""A passage that says nothing (Mohtashami and Jaggi, arXiv 2305.16300)."""


def among_lines(lines: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Return lines with each needle where its share of them is done; depths ascend."""
    out: list[str] = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        place = min(int(depth * len(lines)), len(lines))
        out += [*lines[done:place], needle]
        done = place
    return [*out, *lines[done:]]


def among_sentences(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """Return a text with each needle between the two sentences that are nearest to its share of the characters."""
    gaps = [0, *pieces.sentence_starts(text), len(text)]
    out, done = [], 0
    for needle, depth in zip(needles, depths, strict=True):
        wanted = depth * len(text)
        i = bisect(gaps, wanted, hi=len(gaps) - 1)
        place = min(gaps[i - 1], gaps[i], key=lambda gap: abs(gap - wanted))
        out += [text[done:place].rstrip(), needle]
        done = place
    return " ".join(filter(None, [*out, text[done:]]))


def run(source: Sequence[str], start: int, count: int) -> str:
    """Return so many words from `start` on; after the last comes the first again."""
    turned = list(source[start : start + count])
    while len(turned) < count:
        turned += source[: count - len(turned)]
    return " ".join(turned)


def in_prose(
    source: Sequence[str], start: int, needles: Sequence[str], depths: Sequence[float], *, shuffled: int | None = None
) -> Callable[[int], str]:
    """Return what makes prose of so many words with needles between its sentences.

    Args:
        source: the prose, word by word (`Sources.words`).
        start: its first word.
        needles: sentences to hide.
        depths: where, as shares of the characters; ascending.
        shuffled: a seed by which the sentences are put into another order; None: they keep theirs.
    """

    def hay(count: int) -> str:
        text = run(source, start, count)
        if shuffled is not None:
            told = pieces.sentences(text)
            random.Random(shuffled).shuffle(told)
            text = " ".join(told)
        return among_sentences(text, needles, depths)

    return hay
