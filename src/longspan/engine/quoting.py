"""Whether an answer rests on the text, whichever mechanism read it, and what is quoted where it does not.

An answer is checked against what was read again for it; where nothing was, against the passages cited, since a
mechanism that reads the whole context does not tell what it used. A right answer from elsewhere in the text is then
followed by a quotation that it did not need: the note says what was checked. It does not know how answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence

from longspan.engine.generation import Answer
from longspan.retrieval.grounding import support

MOST = 3
"""Sentences that are quoted where none were read again."""
_SUPPORTED = 0.5
"""Share of an answer's new words that must stand in what it is checked against; below it the text itself is quoted."""


def quotation(question: str, answer: Answer, sentences: Sequence[str]) -> tuple[str, str]:
    """Return a quotation to stand after an answer whose own words are not in the text, and a note that says so.

    Both are empty where the answer's words stand there, or where there is nothing to check them against.

    Args:
        question: what was asked.
        answer: as the model wrote it, with its citations and what was read again.
        sentences: what of the text matters most for the question.
    """
    checked = answer.read_again or [citation.text for citation in answer.citations]
    if not (checked and sentences):
        return "", ""
    supported = support(answer.text, question, checked)
    if supported is None or supported >= _SUPPORTED:
        return "", ""
    told = " ".join(f"“{' '.join(text.split())}”" for text in sentences)
    where = "what it read" if answer.read_again else "the passages cited"
    return f"\n\nThe text says: {told}", f"the model's own words are not in {where}, so the text is quoted"
