"""Documents and the questions about them: those that come with Longspan, or a file in the form of SQuAD or HotpotQA.

It does not know contexts: `documents.py` puts a question's documents among others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from longspan.errors import UsageError

_SHIPPED = Path(__file__).with_name("passages.json")


@dataclass(frozen=True)
class Asked:
    """A question about documents, which are named by their indexes."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right."""
    needs: tuple[int, ...]
    """Documents that the answer needs."""
    near: tuple[int, ...]
    """Others about the same matter: they distract most."""


@dataclass(frozen=True)
class Library:
    """Documents and questions about them."""

    documents: tuple[str, ...]
    asked: tuple[Asked, ...]


@lru_cache(maxsize=1)
def shipped() -> tuple[Library, Library]:
    """Return the questions that need one passage of `passages.json`, and those that need two."""
    single: list[Asked] = []
    hops: list[Asked] = []
    documents: list[str] = []
    for article in json.loads(_SHIPPED.read_text(encoding="utf-8"))["articles"]:
        own = range(len(documents), len(documents) + len(article["passages"]))
        for i, (text, asked) in zip(own, article["passages"], strict=True):
            documents.append(text)
            near = tuple(j for j in own if j != i)
            single += [Asked(question, tuple(answers), (i,), near) for question, answers in asked]
        for question, answers, places in article["hops"]:
            needs = tuple(own[place] for place in places)
            hops.append(Asked(question, tuple(answers), needs, tuple(j for j in own if j not in needs)))
    return Library(tuple(documents), tuple(single)), Library(tuple(documents), tuple(hops))


def read(file: Path) -> tuple[str, Library]:
    """Return which task a file's questions are for, `qa_1` (SQuAD 1.1 or 2.0) or `qa_2` (HotpotQA), and the questions.

    Raises:
        UsageError: it can't be read, or has neither form.
    """
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise UsageError(f"can't read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{file} is no JSON: give a file in the form of SQuAD or HotpotQA") from error
    try:
        found = ("qa_2", _hotpot(data)) if isinstance(data, list) else ("qa_1", _squad(data))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file} has neither the form of SQuAD nor that of HotpotQA ({error!r})") from error
    if not found[1].asked:
        raise UsageError(f"{file} holds no question that has an answer")
    return found


def _squad(data: dict[str, Any]) -> Library:
    """Read `data[].paragraphs[]`: `context` and `qas[]`, as RULER does: a paragraph's article distracts first."""
    index: dict[str, int] = {}
    asked = []
    for article in data["data"]:
        own = [index.setdefault(paragraph["context"], len(index)) for paragraph in article["paragraphs"]]
        for i, paragraph in zip(own, article["paragraphs"], strict=True):
            near = tuple(dict.fromkeys(j for j in own if j != i))
            for each in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in each["answers"]))
                if answers and not each.get("is_impossible", False):
                    asked.append(Asked(each["question"], answers, (i,), near))
    return Library(tuple(index), tuple(asked))


def _hotpot(data: list[dict[str, Any]]) -> Library:
    """Read `question`, `answer` and `context[]` (title, sentences): all of a question's own documents stay with it."""
    index: dict[str, int] = {}
    asked = []
    for each in data:
        own = [index.setdefault(f"{title}\n{''.join(lines)}", len(index)) for title, lines in each["context"]]
        asked.append(Asked(each["question"], (each["answer"],), tuple(dict.fromkeys(own)), ()))
    return Library(tuple(index), tuple(asked))
