"""Perplexity by position: how likely the same words are after more and more of the text before them.

The words that are measured are the same at every length (a place in the prose, drawn by seed and number); what grows is
the context before them, cut at its far end. So differences between lengths are the context's alone, and a model that
uses all of it never does worse with more. This is the loss by position of Press et al. ("Train Short, Test Long", arXiv
2108.12409, section 4) with the words held still.

Prose is read as it is, without a chat template. The mean is taken over the tokens after the first, whose probability
belongs to the context's last token. Where the prose is shorter than the length, it begins anew before its beginning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longspan.evals.questions.example import Draft, Eval, Setting
from longspan.evals.questions.hiding import run


@dataclass(frozen=True)
class Perplexity:
    """The words after a context."""

    words: int = 100
    """Words that are measured: about 130 tokens of prose."""
    max_tokens: int = 0
    scoring: str = "probability"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        source = setting.sources.words
        place = rng.randrange(len(source))
        return Draft(
            context=lambda count: run(source, (place - count) % len(source), count),
            question="",
            answer_prefix="",
            outputs=(),
            least=16,
            follows=" " + run(source, place, self.words),
        )


PERPLEXITY = Eval(
    "perplexity",
    "how likely the same words are after more and more of the text before them",
    "arXiv 2108.12409",
    version=1,
    tasks={"text": Perplexity()},
    paired=True,
)
