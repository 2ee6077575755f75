"""Askers that read less than the whole context: what is retrieved for the question, or summaries of chunks.

Each is an asker around another one, which answers in the end; what it is asked is an example whose context is shorter.
Lengths of questions stay those of the whole context: rows tell both (`tokens`, `read_tokens`). They do not know models.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from longspan.errors import UsageError
from longspan.evals.asking.asker import Asker, Identity, Reply, Tick
from longspan.evals.questions import pieces
from longspan.evals.questions.example import Example, Template
from longspan.evals.questions.making import length_of
from longspan.evals.questions.readings import Full, Reading, Retrieved, Summary


def reading(asker: Asker, how: Reading) -> Asker:
    """Return an asker that reads contexts in this way (UsageError: it can't)."""
    if isinstance(how, Full):
        return asker
    if isinstance(how, Retrieved):
        if how.by != "lexical" and not asker.chooses:
            raise UsageError(
                f"retrieved:by={how.by} needs a model's heads or states, and {asker.identity.model} shows none: "
                "use by=lexical"
            )
        return Retrieving(asker, how)
    return Summing(asker, how)


class _Around:
    """An asker around another one."""

    together = 1

    def __init__(self, asker: Asker) -> None:
        """Take who answers."""
        self._asker = asker

    @property
    def identity(self) -> Identity:
        """See `Asker`."""
        return self._asker.identity

    @property
    def counted_by(self) -> str:
        """See `Asker`."""
        return self._asker.counted_by

    @property
    def template(self) -> Template:
        """See `Asker`."""
        return self._asker.template

    @property
    def parallel(self) -> int:
        """See `Asker`."""
        return self._asker.parallel

    @property
    def measures(self) -> bool:
        """See `Asker`."""
        return self._asker.measures

    @property
    def chooses(self) -> bool:
        """See `Asker`."""
        return self._asker.chooses

    def tokens(self, text: str) -> Sequence[object]:
        """See `Asker`."""
        return self._asker.tokens(text)

    def choose(self, text: str, question: str) -> list[tuple[int, int]]:
        """See `Asker`."""
        return self._asker.choose(text, question)

    def alike(self, texts: Sequence[str], question: str) -> list[int]:
        """See `Asker`."""
        return self._asker.alike(texts, question)

    def ask_all(self, examples: Sequence[Example], tick: Tick) -> list[Reply]:
        """See `Asker`."""
        raise AssertionError("what is read of each context is chosen for its question")

    def _ask(self, example: Example, tick: Tick) -> Reply:
        """Ask an example that was changed."""
        return self._asker.ask(replace(example, tokens=length_of(example, self.tokens)), tick)


class Retrieving(_Around):
    """Reads the passages that are chosen for the question."""

    def __init__(self, asker: Asker, how: Retrieved) -> None:
        """Take who answers, and how passages are chosen."""
        super().__init__(asker)
        self._how = how

    def ask(self, example: Example, tick: Tick) -> Reply:
        """See `Asker`."""
        split = pieces.split(example.context[len(example.head) :])
        began = time.perf_counter()
        best = self._best(split, example.question)
        seconds = time.perf_counter() - began
        shorter = replace(example, context=example.head + split.joined(sorted(best)))
        reply = self._ask(shorter, tick)
        told = {"chosen_passages": float(len(best)), "choosing_s": round(seconds, 4)}
        return replace(reply, measures={**reply.measures, **told})

    def _best(self, split: pieces.Pieces, question: str) -> list[int]:
        """Return the passages to read, best first."""
        most, texts = self._how.passages, split.texts
        if self._how.by == "lexical":
            return pieces.best(texts, question, most)
        if self._how.by == "heads":
            return self._by_heads(split, question)
        alike = self._asker.alike(texts, question)
        if self._how.by == "hybrid":
            from longspan.retrieval.fusion import fused

            alike = fused([pieces.best(texts, question, len(texts)), alike])
        return alike[:most]

    def _by_heads(self, split: pieces.Pieces, question: str) -> list[int]:
        """Return the passages in which the sentences that the heads rank best begin, best first."""
        spans = self._asker.choose(split.joined(range(len(split.texts))), question)
        found = dict.fromkeys(split.at(start) for start, _ in spans)
        return list(found)[: self._how.passages]


class Summing(_Around):
    """Reads summaries of the context's chunks, which the same asker writes one by one."""

    def __init__(self, asker: Asker, how: Summary) -> None:
        """Take who writes and answers, and how long chunks and summaries are."""
        super().__init__(asker)
        self._how = how

    def ask(self, example: Example, tick: Tick) -> Reply:
        """See `Asker`."""
        split = pieces.split(example.context[len(example.head) :])
        written, read, seconds = [], 0, 0.0
        for chunk in self._chunks(split):
            reply = self._ask(self._wanted(example, chunk), tick)
            if reply.error:
                return reply
            written.append(" ".join(reply.text.split()))
            read, seconds = read + reply.read_tokens, seconds + reply.read_seconds + reply.decode_seconds
        reply = self._ask(replace(example, context=example.head + "\n".join(written) + "\n"), tick)
        return replace(
            reply,
            read_tokens=read + reply.read_tokens,
            read_seconds=seconds + reply.read_seconds,
            measures={**reply.measures, "summaries": float(len(written))},
        )

    def _chunks(self, split: pieces.Pieces) -> list[str]:
        """Return passages together as long as they fit a chunk; one that is longer is a chunk by itself."""
        found: list[list[str]] = []
        used = 0
        for text in split.texts:
            count = len(self.tokens(text + split.between))
            if not found or used + count > self._how.chunk:
                found.append([])
                used = 0
            found[-1].append(text)
            used += count
        return [split.between.join(texts) for texts in found]

    def _wanted(self, example: Example, chunk: str) -> Example:
        """Return the request for a chunk's summary: nothing in it is right or wrong."""
        focus = f" Keep all that could help to answer this: {example.question}" if self._how.focused else ""
        asked = f"Sum up the text above in a few sentences, with its names and numbers.{focus}"
        return replace(
            example, context=f"{chunk}\n\n", head="", question=asked, asked=asked, answer_prefix="Summary:", outputs=(),
            scoring="all", max_tokens=self._how.tokens, depths=(), chance=0.0,
        )  # fmt: skip
