"""Variable tracking: a chain of assignments scattered over a haystack; which variables have one value?

RULER (arXiv 2404.06654, section 3): `VAR X1 = 12345`, then `VAR X2 = VAR X1` and so on for `hops` steps, each on a line
of its own, in order, among lines of noise; all variables of the chain are asked for. One solved example stands before
the text, at most 500 tokens long, with names of three letters where the task has five. 30 tokens; the score is the
share of names in the answer. Further chains distract by other values. The wording around the chain is ours, and the
answer prefix does not end in a space, which many tokenizers would join to the first name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

from longspan.evals.questions.example import Draft, Setting
from longspan.evals.questions.fill import fill
from longspan.evals.questions.hiding import NOISE, among_lines

_EXAMPLE = 500
"""Tokens that the solved example may have."""


@dataclass(frozen=True)
class Tracking:
    """Chains of assignments in noise."""

    chains: int = 1
    hops: int = 4
    max_tokens: int = 30
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        values: set[str] = set()
        shown = self._puzzle(rng, 3, values)

        def solved(count: int) -> str:
            answer = " ".join(shown.outputs)
            return f"{shown.context(count)}{shown.question} {shown.answer_prefix} {answer}\n\n"

        lines = fill(lambda count: len(setting.tokens_of(solved(count))), _EXAMPLE, shown.least)
        before = solved(shown.least if lines is None else lines)
        asked = self._puzzle(rng, 5, values)
        return Draft(
            context=lambda count: before + asked.context(count),
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            outputs=asked.outputs,
            least=asked.least,
            needles=asked.needles,
            head=before + asked.head,
            chance=len(asked.outputs) / len(ascii_uppercase) ** 5,
            guess=lambda own: " ".join(_names(own, 5, len(asked.outputs))),
        )

    def _puzzle(self, rng: random.Random, letters: int, values: set[str]) -> Draft:
        """Return chains with names of so many letters; each value joins those that may not come again."""
        names = _names(rng, letters, self.chains * (self.hops + 1))
        needles: list[str] = []
        depths: list[float] = []
        for chain in range(self.chains):
            own = names[chain * (self.hops + 1) :][: self.hops + 1]
            value = str(rng.randint(10000, 99999))
            while value in values:
                value = str(rng.randint(10000, 99999))
            values.add(value)
            needles += [f"VAR {own[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(own))]
            depths += sorted(rng.random() for _ in own)
            if chain == 0:
                asked = value
        # Sorting is stable, so that a chain's own steps keep their order.
        order = sorted(range(len(needles)), key=depths.__getitem__)
        placed, places = [needles[i] for i in order], [depths[i] for i in order]

        head = "Follow the chain of variable assignments that is hidden in the text below.\n\n"

        def context(count: int) -> str:
            told = "\n".join(among_lines([NOISE] * count, placed, places))
            return f"{head}{told}\n"

        return Draft(
            context,
            question=f"Question: Which variables have the value {asked} in the text above? Name all of them.",
            answer_prefix=f"Answer: By the chain of assignments in the text above, {self.hops + 1} variables have the "
            f"value {asked}. They are:",
            outputs=tuple(names[: self.hops + 1]),
            least=1,
            needles=tuple(placed),
            head=head,
        )


def _names(rng: random.Random, letters: int, count: int) -> list[str]:
    """Return distinct names of random capitals."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return list(found)
