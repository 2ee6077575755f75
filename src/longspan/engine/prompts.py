"""The words around documents and questions, and the tokens they make. No other file writes words to a model."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.hf.model import CausalModel
from longspan.hf.tokenizer import Tokenizer
from longspan.sessions.session import Turn

SYSTEM = "You answer questions about a text. Answer briefly and use only what the text says."
BEFORE = "Here is the text:\n\n"
AFTER = "\n\nQuestion: "
"""What stands before documents and behind them in the user's first message."""
_GAP = "\n\n"
_DOCUMENTS = "\ue000documents\ue001"  # private-use characters, in no real text: where the documents stand


def before_documents(model: CausalModel) -> list[int]:
    """Return the tokens before the documents: the same whatever is asked, so that they are read once."""
    return model.tokens(_around(model, "", [])[0])


def after_documents(model: CausalModel, question: str, turns: Sequence[Turn]) -> list[int]:
    """Return the tokens after the documents: the conversation so far and the question, ready for the answer."""
    return model.tokens(_around(model, question, turns)[1])


def _around(model: CausalModel, question: str, turns: Sequence[Turn]) -> tuple[str, str]:
    """Return the text before and after the documents, which stand in the first message of the user."""
    questions = [*(turn.question for turn in turns), question]
    messages = [{"role": "system", "content": SYSTEM}]
    for i, asked in enumerate(questions):
        content = BEFORE + _DOCUMENTS + AFTER + asked if i == 0 else asked
        messages.append({"role": "user", "content": content})
        if i < len(turns):
            messages.append({"role": "assistant", "content": turns[i].answer})
    head, _, rest = model.chat(messages).partition(_DOCUMENTS)
    return head, rest


def bare(model: CausalModel | Tokenizer) -> tuple[str, str]:
    """Return what the model's template puts before and after a user's only message, without words of ours.

    Both are empty for a model without a template.
    """
    if not model.tokenizer.chat_template:
        return "", ""
    head, _, rest = model.chat([{"role": "user", "content": _DOCUMENTS}]).partition(_DOCUMENTS)
    return head, rest


def search_question(model: CausalModel, question: str) -> list[int]:
    """Return the tokens with which retrieval heads are asked: the question as the text would go on."""
    return model.tokens(f"\n\nQuestion: {question}\nAnswer:")


def over_passages(model: CausalModel, texts: Sequence[str], question: str, turns: Sequence[Turn]) -> list[int]:
    """Return the prompt that reads chosen passages again, in the order given, after a conversation."""
    return _over(model, _GAP.join(texts), question, turns)


def over_sentences(model: CausalModel, texts: Sequence[str], question: str, turns: Sequence[Turn]) -> list[int]:
    """Return the prompt that reads chosen sentences again, as a list in the order given.

    As a list, one line each: a small model then keeps them apart (docs/experiments.md).
    """
    return _over(model, "\n".join("- " + " ".join(sentence.split()) for sentence in texts), question, turns)


def _over(model: CausalModel, text: str, question: str, turns: Sequence[Turn]) -> list[int]:
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    messages.append({"role": "user", "content": BEFORE + text + AFTER + question})
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
