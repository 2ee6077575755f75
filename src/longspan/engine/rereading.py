"""What retrieval reads again for an answer, as much of it as fits the window.

It does not know how pages and sentences were chosen (`choosing.py`), nor how an answer is written (`generation.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from longspan.attention.retrieval import Retrieval
from longspan.engine import prompts
from longspan.engine.choosing import Chosen
from longspan.errors import ContextTooLongError
from longspan.hf.model import CausalModel
from longspan.sessions.session import Session, Turn

ANSWER_ROOM = 256
"""Tokens that a prompt leaves for the answer."""


def prompt_again(
    model: CausalModel, mechanism: Retrieval, session: Session, chosen: Chosen, question: str, turns: Sequence[Turn]
) -> tuple[list[int], list[str]]:
    """Return the prompt that reads what was chosen again, and the texts that it reads, best first.

    Raises:
        ContextTooLongError: not even a part of the best passage fits beside the question.
    """
    if mechanism.focus:
        best = chosen.clear(session, mechanism.focus, question)
        over = prompts.over_sentences
    else:
        best = [citation.text for citation in chosen.citations]
        over = prompts.over_passages
    recent = turns[-2:]

    def options() -> Iterator[tuple[list[int], list[str]]]:
        # The best is read last, next to the question.
        for count in range(len(best), 0, -1):
            for told in shorter(recent):
                yield over(model, best[:count][::-1], question, told), best[:count]
        # A window too small for one passage gets as much of it as fits.
        for share in (2, 4, 8):
            cut = [text[: len(text) // share] for text in best[:1]]
            yield over(model, cut, question, []), cut

    for prompt, read in options():
        if _fits(model, prompt):
            return prompt, read
    raise _too_long(model)


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
