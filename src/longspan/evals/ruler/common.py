"""Common words: a numbered list in which ten words stand more often than all others; which?

RULER (arXiv 2404.06654, section 3): each of 10 common words 30 times, each uncommon word 3 times, shuffled; more length
means more uncommon words. Below 4096 tokens the counts are 6 and 1. One solved example stands before the list: 40 words
(10 and 3 times), below 4096 tokens 20 words (3 times and once). 120 tokens; the score is the share of the ten in the
answer.

Here: words are those of `words.txt`, and compounds of them where these do not suffice (RULER changes to a larger list
there); a common word is no part of any other word of its list, since scoring looks for it anywhere in the answer; the
wording is ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from longspan.evals.questions import words
from longspan.evals.questions.example import Draft, Setting
from longspan.evals.questions.fill import Drawn

_SHORT = 4096
"""Tokens below which lists are made with the smaller counts."""


@dataclass(frozen=True)
class Common:
    """Common words in a list."""

    common: int = 10
    """Words asked for."""
    often: int = 30
    """Times that each of them stands in the list."""
    seldom: int = 3
    """Times that each other word does."""
    max_tokens: int = 120
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        short = setting.length < _SHORT
        often, seldom = (6, 1) if short else (self.often, self.seldom)
        solved, answer = self._list(rng, _shuffled(rng), *((3, 1) if short else (10, 3)))
        before = f"{solved(20 if short else 40)}{self._question} {self._prefix} {_numbered(answer)}\n\n"
        hay, outputs = self._list(rng, _shuffled(rng), often, seldom)
        if len(setting.tokens_of(hay(len(words.single())))) <= setting.length:
            hay, outputs = self._list(rng, words.compounds(random.Random(rng.getrandbits(64))), often, seldom)
        return Draft(
            context=lambda count: before + hay(count),
            question=self._question,
            answer_prefix=self._prefix,
            outputs=tuple(outputs),
            least=self.common + 1,
            head=before,
            chance=self.common / len(words.single()),
            guess=lambda own: " ".join(own.sample(words.single(), self.common)),
        )

    def _list(
        self, rng: random.Random, source: Iterator[str], often: int, seldom: int
    ) -> tuple[Callable[[int], str], list[str]]:
        """Return what tells a list of so many different words, and the common ones among them."""
        common: list[str] = []
        while len(common) < self.common:
            word = next(source)
            if not any(word in other or other in word for other in common):
                common.append(word)
        rest = Drawn(word for word in source if not any(other in word for other in common))
        places = rng.getrandbits(64)

        def told(count: int) -> str:
            listed = common * often + rest.first(count - self.common) * seldom
            random.Random(places).shuffle(listed)
            return (
                "Below is a numbered list of words, some of which stand in it more often than others. Keep in mind "
                f"those that stand in it most often.\n{_numbered(listed)}\n"
            )

        return told, common

    @property
    def _question(self) -> str:
        return f"Question: Which {self.common} words stand most often in the list above?"

    @property
    def _prefix(self) -> str:
        return f"Answer: The {self.common} words that stand most often in the list are:"


def _shuffled(rng: random.Random) -> Iterator[str]:
    return iter(rng.sample(words.single(), len(words.single())))


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
