"""Needles: keys and values hidden in a haystack, asked for by key.

RULER (arXiv 2404.06654, section 3; configurations of its `synthetic.yaml`): one sentence a needle, `One of
the special magic numbers for KEY is: VALUE.`, with keys of two words or a UUID and values of seven digits or a UUID, in
one of three haystacks:

- `noise`: lines of one passage that says nothing (Mohtashami and Jaggi, arXiv 2305.16300);
- `essay`: prose, cut to size by words; needles stand between sentences, at some of 40 depths from 0 to 100 %;
- `needle`: lines that are needles of the same form, each with another key.

128 tokens; the score is the share of values in the answer. Here: prose is not Paul Graham's essays but `Sources.essay`,
and each example begins elsewhere in it; depths there are shares of characters, not of sentences, which differ much in
length; keys are words of `words.txt`; no key and no value stands twice; the needle keeps RULER's words, and instruction
and question are ours.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from longspan.evals.questions import words
from longspan.evals.questions.example import Draft, Setting
from longspan.evals.questions.fill import Drawn
from longspan.evals.questions.hiding import NOISE, among_lines, in_prose

_DEPTHS = tuple(round(100 * i / 39) / 100 for i in range(40))
_POSSIBLE = {"numbers": 9 * 10**6, "uuids": 2**122}
"""Values that there may be."""


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack."""

    haystack: str
    """`noise`, `essay` or `needle`."""
    keys: str = "words"
    """`words` or `uuids`."""
    values: str = "numbers"
    """`numbers` or `uuids`."""
    needle_keys: int = 1
    """Keys hidden; those that are not asked for distract."""
    key_values: int = 1
    """Values of each key, a needle each."""
    queries: int = 1
    """Keys asked for."""
    depth: float | None = None
    """Where all needles stand, from 0 to 1; None: drawn."""
    max_tokens: int = 128
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        pairs = _pairs(self.keys, self.values, random.Random(rng.getrandbits(64)))
        held = [[next(pairs) for _ in range(self.key_values)] for _ in range(max(self.needle_keys, self.queries))]
        # A key with several values keeps the first pair's key.
        keyed = [(group[0][0], [value for _, value in group]) for group in held]
        needles = [_needle(self.values, key, value) for key, values in keyed for value in values]
        rng.shuffle(needles)
        depths = self._depths(rng, len(needles))
        asked = rng.sample(keyed, self.queries)
        if self.haystack == "essay":
            source = setting.sources.words
            hay = in_prose(source, rng.randrange(len(source)), needles, depths)
        else:
            lines = Drawn(_lines(self, pairs))

            def hay(count: int) -> str:
                return "\n".join(among_lines(lines.first(count), needles, depths))

        many = self.key_values * self.queries > 1
        kind = self.values if many else self.values.removesuffix("s")
        head = (
            f"Some special magic {kind} are hidden in the text below. Keep them in mind: I will ask for them later."
            if many
            else f"A special magic {kind} is hidden in the text below. Keep it in mind: I will ask for it later."
        )
        names = _listed([key for key, _ in asked])
        what = f"What are all the special magic {kind}" if many else f"What is the special magic {kind}"
        return Draft(
            context=lambda count: f"{head}\n{hay(count)}\n",
            question=f"{what} for {names} in the text above?",
            answer_prefix=f"The special magic {kind} for {names} in the text above {'are' if many else 'is'}",
            outputs=tuple(value for _, values in asked for value in values),
            least=len(needles),
            needles=tuple(needles),
            head=f"{head}\n",
            chance=len(asked) * self.key_values / _POSSIBLE[self.values],
            guess=lambda own: " ".join(next(_pairs(self.keys, self.values, own))[1] for _ in asked for _ in held[0]),
        )

    def _depths(self, rng: random.Random, count: int) -> list[float]:
        """Return a share of the haystack for each needle, ascending."""
        if self.depth is not None:
            return [self.depth] * count
        if self.haystack == "essay":
            return sorted(rng.sample(_DEPTHS, count))
        return sorted(rng.random() for _ in range(count))


def _lines(config: Niah, pairs: Iterator[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of a haystack that is no prose."""
    while True:
        yield NOISE if config.haystack == "noise" else _needle(config.values, *next(pairs))


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _pairs(keys: str, values: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield keys and values, no text of which comes twice."""
    names, seen = words.compounds(rng), set[str]()

    def fresh(kind: str) -> str:
        while True:
            if kind == "words":
                return next(names)
            text = str(rng.randint(10**6, 10**7 - 1)) if kind == "numbers" else _uuid(rng)
            if text not in seen:
                seen.add(text)
                return text

    while True:
        yield fresh(keys), fresh(values)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _listed(names: list[str]) -> str:
    """Return names as a list in a sentence."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f", and {names[-1]}"
