"""The words around documents and questions, and the tokens they make. No other file writes words to a model."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.hf.model import CausalModel
from longspan.sessions.session import Turn

SYSTEM = "You answer questions about a text. Answer briefly and use only what the text says."
_BEFORE = "Here is the text:\n\n"
_AFTER = "\n\nQuestion: "
_GAP = "\n\n"


def around_documents(model: CausalModel) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens before the documents, between documents and question, and after the question."""
    head, middle, tail = model.chat_around(_BEFORE, _AFTER, SYSTEM)
    return model.tokens(head), model.tokens(middle), model.tokens(tail)


def search_question(model: CausalModel, question: str) -> list[int]:
    """Return the tokens with which retrieval heads are asked: the question as the text would go on."""
    return model.tokens(f"\n\nQuestion: {question}\nAnswer:")


def over_passages(model: CausalModel, passages: Sequence[str], question: str, turns: Sequence[Turn]) -> list[int]:
    """Return the prompt that reads chosen passages again.

    Args:
        model: for its chat template.
        passages: in the order in which they are read.
        question: the user's question.
        turns: those of the conversation that are repeated.
    """
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": _BEFORE + _GAP.join(passages) + _AFTER + question})
    return model.tokens(model.chat(messages))


def plain(model: CausalModel, question: str, turns: Sequence[Turn]) -> list[int]:
    """Return the prompt of a conversation without documents."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": question})
    return model.tokens(model.chat(messages))


def separator(model: CausalModel, name: str) -> list[int]:
    """Return the tokens that stand before a document that is not the first."""
    return model.tokens(f"\n\n{name}:\n\n")
