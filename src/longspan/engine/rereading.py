"""What retrieval reads again for an answer, as much of it as fits the window, and whether the answer rests on it.

It does not know how pages and sentences were chosen (`choosing.py`), nor how an answer is written (`generation.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts
from longspan.engine.choosing import Chosen
from longspan.errors import ContextTooLongError
from longspan.hf.model import CausalModel
from longspan.retrieval.grounding import support
from longspan.sessions.session import Session, Turn

ANSWER_ROOM = 256
"""Tokens that a prompt leaves for the answer."""
_SHARE = 0.3
"""Of the best sentence's score that another must have to be read again: second facts that a question needs had 0.45 and
more in 10 of 12 questions, what stood around a single fact 0.28 and less (docs/experiments.md)."""
_SUPPORTED = 0.5
"""Share of an answer's new words that must stand in what was read; below it the text itself is quoted."""


def prompt_again(
    model: CausalModel, mechanism: Retrieval, session: Session, chosen: Chosen, question: str
) -> tuple[list[int], list[str]]:
    """Return the prompt that reads what was chosen again, and the texts that it reads, best first.

    Raises:
        ContextTooLongError: not even a part of the best passage fits beside the question.
    """
    if mechanism.focus:
        bar = _SHARE * chosen.sentences[0].mass if chosen.sentences else 0.0
        clear = [s for s in chosen.sentences[: mechanism.focus] if s.mass >= bar]
        best = [session.documents[s.document].text[s.start : s.end] for s in clear]
        over = prompts.over_sentences
    else:
        best = [citation.text for citation in chosen.citations]
        over = prompts.over_passages
    recent = session.turns[-2:]

    def options() -> Iterator[tuple[list[int], list[str]]]:
        # The best is read last, next to the question.
        for count in range(len(best), 0, -1):
            for turns in shorter(recent):
                yield over(model, best[:count][::-1], question, turns), best[:count]
        # A window too small for one passage gets as much of it as fits.
        for share in (2, 4, 8):
            cut = [text[: len(text) // share] for text in best[:1]]
            yield over(model, cut, question, []), cut

    for prompt, read in options():
        if _fits(model, prompt):
            return prompt, read
    raise _too_long(model)


def quotation(mechanism: Retrieval, question: str, answer: str, read: Sequence[str]) -> str:
    """Return a quotation of the sentences read, to stand after an answer whose own words are not in them; else ``."""
    if not (mechanism.quote and mechanism.focus and read):
        return ""
    supported = support(answer, question, read)
    if supported is None or supported >= _SUPPORTED:
        return ""
    return "\n\nThe text says: " + " ".join(f"“{' '.join(text.split())}”" for text in read)


def fitting(model: CausalModel, options: Iterable[list[int]]) -> list[int]:
    """Return the first prompt that leaves room for an answer (ContextTooLongError: none does)."""
    for prompt in options:
        if _fits(model, prompt):
            return prompt
    raise _too_long(model)


def shorter(turns: Sequence[Turn]) -> Iterator[Sequence[Turn]]:
    """Yield the conversation, then without its oldest turn, and so on to none."""
    for start in range(len(turns) + 1):
        yield turns[start:]


def _fits(model: CausalModel, prompt: list[int]) -> bool:
    window = model.dimensions.window
    return len(prompt) + min(ANSWER_ROOM, window // 4) <= window


def _too_long(model: CausalModel) -> ContextTooLongError:
    window = model.dimensions.window
    return ContextTooLongError(
        f"question and passages do not fit the model's window of {window} tokens: shorten the question"
    )
