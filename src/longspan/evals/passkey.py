"""Passkey: one number in a text that says nothing; which?

Mohtashami and Jaggi, "Landmark Attention" (arXiv 2305.16300, section 4.2): a sentence that gives a pass key stands at a
random place among repetitions of one passage; the key is asked for at the end. Here as there: the passage, the needle's
two sentences, a key of five digits. The wording of instruction and question is ours, and an answer may take 16 tokens.
It is the easiest of all: who fails it does not reach that far back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longspan.evals.questions.example import Draft, Eval, Setting
from longspan.evals.questions.hiding import NOISE, among_lines

_LEAST, _MOST = 10_000, 99_999


@dataclass(frozen=True)
class Passkey:
    """A number in noise."""

    depth: float | None = None
    """Where it stands, from 0 to 1; None: drawn."""
    max_tokens: int = 16
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        key = _key(rng)
        depth = rng.random() if self.depth is None else self.depth
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        head = "The text below says nothing, but for one pass key that is hidden in it. I will ask for it later.\n"
        return Draft(
            context=lambda count: head + "\n".join(among_lines([NOISE] * count, [needle], [depth])) + "\n",
            question="What is the pass key in the text above?",
            answer_prefix="The pass key is",
            outputs=(key,),
            least=1,
            needles=(needle,),
            head=head,
            chance=1 / (_MOST - _LEAST + 1),
            guess=_key,
        )


def _key(rng: random.Random) -> str:
    return str(rng.randint(_LEAST, _MOST))


PASSKEY = Eval(
    "passkey",
    "one number in a text that says nothing",
    "arXiv 2305.16300",
    version=1,
    tasks={"passkey": Passkey()},
    ordered=frozenset({"passkey"}),
)
