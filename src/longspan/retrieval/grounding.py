"""Whether an answer's own words stand in the text that it was given.

A small model that has the right sentence before it may still answer from memory. What can be checked without another
model is where its words come from: those that are neither the question's nor mere grammar must stand in what was read.
It does not know meaning: an answer that says the right thing in other words counts as unsupported, and one that
misreads words of the text as supported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from longspan.retrieval.lexical import Stems

_OPEN = re.compile(
    r"\b(what|which|who|whom|whose|where|when|how many|how much|how long|how old|how far)\b", re.IGNORECASE
)
_MORE = re.compile(rf"(?:\b(?:and|or)\b|[,;?])\s*(?:{_OPEN.pattern})", re.IGNORECASE)
"""Where a question asks for a second thing."""

_YES_NO = frozenset("yes no да нет ja nein oui non sí sì si sim não tak nie".split())
"""What answers a question without saying anything that could stand in a text."""


def support(answer: str, question: str, texts: Sequence[str]) -> float | None:
    """Return the share, 0 to 1, of the answer's new words that stand in the texts; new: not in the question.

    An answer without a new word supports nothing if the question asks for something (what, who, where ...); to a yes or
    no it can't be judged: None.
    """
    stems = Stems("english")
    asked = set(stems(question))
    new = set(stems(answer)) - asked - _YES_NO
    if not new:
        return 0.0 if _OPEN.search(question) else None
    given = {stem for text in texts for stem in stems(text)}
    return len(new & given) / len(new)


def answers_alone(text: str, question: str) -> bool:
    """Return whether a text has every word of a question that asks for one thing: nothing beside it need be read.

    A question that asks for more (who ..., and when?) may want what other sentences say.
    """
    if _MORE.search(question):
        return False
    stems = Stems("english")
    asked = set(stems(_OPEN.sub(" ", question)))
    return bool(asked) and asked <= set(stems(text))
