"""QA 1 and 2: a question about one document, or about two that must be joined, among documents that distract.

RULER (arXiv 2404.06654, section 3) takes questions of SQuAD (`qa_1`) and HotpotQA (`qa_2`), puts numbered
documents around those that hold the answer, in any order, and counts an answer as right if it contains any of the
accepted ones; 32 tokens. Here:

- questions and passages are Longspan's own, about what does not exist, so that no model knows the answers by heart; or
  those of a file that the user names (`passages.read`), then as in RULER;
- distractors are first the passages about the same matter, then the other ones, then invented ones (`invented.py`),
  where RULER tells the same documents again: no document stands twice in a context;
- questions are taken in an order given by the seed, and again from the first once all were asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from longspan.evals.questions import invented
from longspan.evals.questions.example import Draft, Setting
from longspan.evals.questions.fill import Drawn
from longspan.evals.questions.passages import Asked, Library
from longspan.evals.questions.scoring import score

_ASKING = "Answer the question from the documents {where}. Give the answer alone and no other words."


@dataclass(frozen=True)
class Documents:
    """Question answering among distractors."""

    hops: bool = False
    """Whether a question needs two documents."""
    max_tokens: int = 32
    scoring: str = "any"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        library = setting.sources.hops if self.hops else setting.sources.single
        order = list(range(len(library.asked)))
        random.Random(f"ruler-questions-{setting.order}").shuffle(order)
        asked = library.asked[order[setting.index % len(order)]]
        needed = tuple(library.documents[i] for i in asked.needs)
        others = Drawn(_others(library, asked, random.Random(rng.getrandbits(64))))
        places = rng.getrandbits(64)

        head = f"{_ASKING.format(where='below')}\n\nThese are the documents.\n\n"

        def context(count: int) -> str:
            documents = [*needed, *others.first(count - len(needed))]
            random.Random(places).shuffle(documents)
            told = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
            return f"{head}{told}\n\n"

        question = f"{_ASKING.format(where='above')}\n\nQuestion: {asked.question}"
        right = sum(score(other.answers[0], asked.answers, self.scoring) for other in library.asked)
        return Draft(
            context,
            question,
            "Answer:",
            asked.answers,
            least=len(needed),
            needles=needed,
            head=head,
            chance=right / len(library.asked),
            guess=lambda own: own.choice(library.asked).answers[0],
        )


def _others(library: Library, asked: Asked, rng: random.Random) -> Iterator[str]:
    """Yield documents that the question does not need, those that distract most first."""
    near = list(asked.near)
    rest = [i for i in range(len(library.documents)) if i not in {*asked.needs, *near}]
    for some in (near, rest):
        rng.shuffle(some)
        yield from (library.documents[i] for i in some)
    yield from invented.passages(rng)
