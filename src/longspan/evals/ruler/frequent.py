"""Frequent words: a text of coded words whose counts fall by rank; which three are the most frequent?

RULER (arXiv 2404.06654, section 3): words of six random letters; of N words, the one of rank k stands
floor(N k^-alpha / zeta(alpha)) times, alpha 2, shuffled. Rank 1 is the noise `...`, so that ranks 2 to 4 are asked for.
The vocabulary is a 50th of the length. 50 tokens; the score is the share of the three in the answer. The wording is
ours, and N is found one by one, not in steps of a 32nd of the length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from string import ascii_lowercase

from longspan.evals.questions.example import Draft, Setting

NOISE = "..."
_ASKED = 3


@dataclass(frozen=True)
class Frequent:
    """Coded words by Zipf's law."""

    alpha: float = 2.0
    letters: int = 6
    max_tokens: int = 50
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        size = max((setting.length - self.max_tokens) // 50, _ASKED + 2)
        coded: dict[str, None] = {}
        while len(coded) < size:
            coded["".join(rng.choices(ascii_lowercase, k=self.letters))] = None
        vocabulary = [NOISE, *coded][:size]
        whole, places = zeta(self.alpha), rng.getrandbits(64)

        def count(rank: int, total: int) -> int:
            return int(total * rank**-self.alpha / whole)

        def context(total: int) -> str:
            words = [word for rank, word in enumerate(vocabulary, 1) for _ in range(count(rank, total))]
            random.Random(places).shuffle(words)
            return (
                "Below is a coded text. Count how often each coded word stands in it, and find the three most frequent "
                f"ones. {' '.join(words)}\n"
            )

        # The last rank asked for must be ahead of the next one, whatever the total from here on.
        least = 1
        while not _ahead(self.alpha, least / whole):
            least += 1
        return Draft(
            context,
            question=f"Question: Explain nothing, and leave out the dots '{NOISE}'. Which three words are the most "
            "frequent in the coded text above?",
            answer_prefix="Answer: By the coded text above, the three most frequent words are:",
            outputs=tuple(vocabulary[1 : 1 + _ASKED]),
            least=least,
            chance=_ASKED / len(ascii_lowercase) ** self.letters,
            guess=lambda own: " ".join("".join(own.choices(ascii_lowercase, k=self.letters)) for _ in range(_ASKED)),
        )


def zeta(alpha: float) -> float:
    """Return Riemann's zeta function for alpha > 1 (Euler and Maclaurin's sum, exact to 1e-12)."""
    first = 64
    head = sum(k**-alpha for k in range(1, first))
    return float(
        head
        + first ** (1 - alpha) / (alpha - 1)
        + first**-alpha / 2
        + alpha * first ** (-alpha - 1) / 12
        - alpha * (alpha + 1) * (alpha + 2) * first ** (-alpha - 3) / 720
    )


def _ahead(alpha: float, scale: float) -> bool:
    """Return whether ranks 4 and 5 differ by at least one whole word."""
    last = 1 + _ASKED
    return bool(scale * (last**-alpha - (last + 1) ** -alpha) >= 1)
