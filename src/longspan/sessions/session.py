"""A session: documents, their tokens and where each stands in its text, the conversation, and what the model remembers.

It does not know models: the engine above fills `tokens` and `memory`, and `store.py` keeps it all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longspan.errors import SessionCorruptError, UsageError
from longspan.sessions.store import JSON, Rows, SavedSession

_TOGETHER = 1024  # tokens that are one row of what is saved


@dataclass(frozen=True)
class Passage:
    """A stretch of one document: `text` is exactly the document's `text[start:end]`."""

    document: int
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class SessionDocument:
    """A document and the tokens `first .. last - 1` of the session that are its text."""

    name: str
    text: str
    first: int
    last: int


@dataclass(eq=False)
class Session:
    """Documents and what was asked about them."""

    name: str | None = None
    """Under which it is saved; None: only in memory."""
    documents: list[SessionDocument] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """All documents' tokens in order, with what separates documents."""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """For each token, its first character in its document and the one after its last; (-1, -1) for separators."""
    turns: list[Turn] = field(default_factory=list)
    memory: Any = None
    """The engine's context, once something was read."""
    head: int = 0
    """Tokens of the chat template that stand before the documents in the context."""
    saved_length: int = -1
    """Length of the context when it was last saved or restored: what need not be written again."""
    engine: Any = field(default=None, repr=False)
    """Who reads and answers (an `LLM`); None: the session holds what it is given, and can't be asked."""

    def __enter__(self) -> Session:
        """Use it in a `with` block, at whose end it is saved if it has a name."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Save it; after an error too, since what was read before stands."""
        if self.name is not None and self.engine is not None:
            self.engine.save(self)

    def append(self, *paths: str | os.PathLike[str]) -> Any:
        """Read documents (see `LLM.read`), and save the session if it has a name."""
        reading = self._engine().read(self, list(paths))
        self.save()
        return reading

    def ask(self, question: str, **how: Any) -> Any:
        """Answer a question about the documents, remembering both (see `LLM.ask`; `remember=False`: not)."""
        return self._engine().ask(question, self, **{"remember": True, **how})

    def save(self) -> None:
        """Save what is new, if it has a name (see `LLM.save`)."""
        if self.name is not None:
            self._engine().save(self)

    def _engine(self) -> Any:
        if self.engine is None:
            raise UsageError("a session that no model opened can't read or answer: get it from llm.session(NAME)")
        return self.engine

    def add_document(
        self, name: str, text: str, tokens: Sequence[int], offsets: Sequence[tuple[int, int]], separator: Sequence[int]
    ) -> None:
        """Append a document whose tokens begin at the given characters of its text."""
        if len(tokens) != len(offsets):
            raise UsageError(f"{len(tokens)} tokens but {len(offsets)} offsets")
        if self.documents:
            self.tokens.extend(separator)
            self.offsets.extend([(-1, -1)] * len(separator))
        first = len(self.tokens)
        self.tokens.extend(tokens)
        self.offsets.extend(offsets)
        self.documents.append(SessionDocument(name, text, first, len(self.tokens)))

    def keep_documents(self, count: int) -> None:
        """Forget all but the first `count` documents."""
        del self.documents[count:]
        last = self.documents[-1].last if self.documents else 0
        del self.tokens[last:], self.offsets[last:]

    def has(self, text: str) -> bool:
        """Return whether a document with this very text was added already."""
        return any(document.text == text for document in self.documents)

    def fork(self, name: str | None = None) -> Session:
        """Return a session of the same documents, conversation and memory (whose pages it shares) by another name.

        What is saved of it is shared on disk too (see `LLM.fork`).
        """
        return self.shared(name) if self.engine is None else self.engine.fork(self, name)

    def shared(self, name: str | None = None) -> Session:
        """Return such a session in memory alone."""
        memory = None if self.memory is None else self.memory.fork()
        return Session(
            name,
            list(self.documents),
            list(self.tokens),
            list(self.offsets),
            list(self.turns),
            memory,
            self.head,
            engine=self.engine,
        )

    def passages(self, first: int, last: int) -> list[Passage]:
        """Return the text of the tokens `first .. last - 1`, one passage a document that they touch."""
        found = []
        for i, document in enumerate(self.documents):
            begin, stop = max(first, document.first), min(last, document.last)
            if begin < stop:
                start, end = self.offsets[begin][0], self.offsets[stop - 1][1]
                if start < end:
                    found.append(Passage(i, start, end, document.text[start:end]))
        return found

    def to_saved(self) -> tuple[dict[str, JSON], dict[str, Tensor | Rows], dict[str, str]]:
        """Return what a store keeps of documents and conversation: state, tensors, texts."""
        state: dict[str, JSON] = {
            "documents": [{"name": d.name, "first": d.first, "last": d.last} for d in self.documents],
            "turns": len(self.turns),
            "head": self.head,
        }
        tensors: dict[str, Tensor | Rows] = {
            "tokens": Rows(torch.tensor(self.tokens, dtype=torch.int32), step=_TOGETHER),
            "offsets": Rows(torch.tensor(self.offsets, dtype=torch.int64).view(-1, 2), step=_TOGETHER),
        }
        texts = {str(i): document.text for i, document in enumerate(self.documents)}
        # Each of its own, so that a long conversation is not written again with every answer.
        for i, turn in enumerate(self.turns):
            texts |= {f"question.{i}": turn.question, f"answer.{i}": turn.answer}
        return state, tensors, texts

    @classmethod
    def from_saved(cls, saved: SavedSession) -> Session:
        """Return the session that was saved, without its memory (SessionCorruptError if it does not fit together)."""
        try:
            state: Any = saved.state
            stored = saved.tensors["documents"]
            documents = [
                SessionDocument(str(d["name"]), saved.texts[str(i)], int(d["first"]), int(d["last"]))
                for i, d in enumerate(state["documents"])
            ]
            count = state["turns"]
            if isinstance(count, list):  # as it was before journals
                turns = [Turn(str(t["question"]), str(t["answer"])) for t in count]
            else:
                turns = [Turn(saved.texts[f"question.{i}"], saved.texts[f"answer.{i}"]) for i in range(count)]
            tokens: list[int] = stored["tokens"].tolist()
            first, last = stored["offsets"].view(-1, 2).unbind(1)
            offsets: list[tuple[int, int]] = list(zip(first.tolist(), last.tolist(), strict=True))
            session = cls(saved.name, documents, tokens, offsets, turns, head=int(state["head"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SessionCorruptError(
                f"session {saved.name!r} lacks {error}: remove it with `longspan session rm {saved.name}`"
            ) from error
        if len(tokens) != len(offsets) or any(d.last > len(tokens) for d in documents):
            raise SessionCorruptError(
                f"session {saved.name!r} does not fit together: remove it with `longspan session rm {saved.name}`"
            )
        return session
