"""Several rankings of the same things joined into one.

Reciprocal rank fusion (G. Cormack, C. Clarke, S. Büttcher, SIGIR 2009, doi:10.1145/1571941.1572114): a thing scores the
sum of `1 / (60 + rank)` over the rankings, ranks counted from 1. Scores of different kinds (BM25, cosines) are never
compared with one another, only places. What differs from the paper: a thing that a ranking lacks stands directly behind
its last, instead of getting nothing from it. BM25 ranks only what shares a word; any such passage would stand before
all that meaning alone finds. It does not know what is ranked.
"""

from __future__ import annotations

from collections.abc import Sequence

_K = 60
"""How slowly a place further down counts less: the paper's."""


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Return every thing that a ranking holds, best first; of equal ones that of the lower number.

    Args:
        rankings: things by number, best first, each at most once a ranking.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        behind = 1 / (_K + len(ranking) + 1)
        places = {thing: 1 / (_K + rank) for rank, thing in enumerate(ranking, 1)}
        for thing in {thing for each in rankings for thing in each}:
            scores[thing] = scores.get(thing, 0.0) + places.get(thing, behind)
    return sorted(scores, key=lambda thing: (-scores[thing], thing))
