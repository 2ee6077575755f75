"""What of a session's documents matters for a question: pages, passages to cite, sentences to read again.

The model's retrieval heads vote for pages by their attention; a lexical index over the same pages votes too, with a
small weight. It does not answer, and it does not know how chosen text is read.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.engine import prompts
from longspan.engine.contexts import Context
from longspan.engine.generation import Citation
from longspan.hf.model import CausalModel
from longspan.kv.base import PAGE
from longspan.retrieval import sentences
from longspan.retrieval.choose import Choice, choose_pages, page_mass
from longspan.retrieval.grounding import answers_alone
from longspan.retrieval.heads import RetrievalHeads
from longspan.retrieval.lexical import LexicalIndex
from longspan.retrieval.sentences import Sentence
from longspan.retrieval.words import whole_words
from longspan.sessions.session import Passage, Session

LEXICAL_WEIGHT = 0.1
"""Weight of the lexical vote for pages beside the retrieval heads'; see docs/experiments.md."""
_SHARE = 0.3
"""Of the best sentence's score that another must have to be read again: second facts that a question needs had 0.45 and
more in 10 of 12 questions, what stood around a single fact 0.28 and less (docs/experiments.md)."""


@dataclass(frozen=True)
class Chosen:
    """What matters for a question, each list best first."""

    pages: list[Choice]
    citations: list[Citation]
    sentences: list[Sentence]

    def clear(self, session: Session, most: int, question: str) -> list[str]:
        """Return the text of up to `most` sentences, best first, each once, without those far behind the best.

        Where the best has every word of the question it stands alone: a small model is led astray by what is beside it.
        """
        bar = _SHARE * self.sentences[0].mass if self.sentences else 0.0
        clear = (s for s in self.sentences if s.mass >= bar)
        texts = list(dict.fromkeys(session.documents[s.document].text[s.start : s.end] for s in clear))[:most]
        return texts[:1] if texts and answers_alone(texts[0], question) else texts


class Chooser:
    """Chooses from sessions read by one model; keeps the lexical index of the session asked last."""

    def __init__(self, model: CausalModel) -> None:
        """Take the model that asks."""
        self.model = model
        self._index: tuple[weakref.ref[Session], int, LexicalIndex] | None = None

    def choose(
        self, question: str, session: Session, heads: RetrievalHeads | None, *, count: int, reach: int, lexical: bool
    ) -> Chosen:
        """Choose pages of a session that was read.

        Args:
            question: the user's question.
            session: with its memory.
            heads: the model's retrieval heads; None: the lexical index chooses alone.
            count: pages to choose.
            reach: neighbours on each side of a page that belong to its passage.
            lexical: whether the lexical index votes beside the heads.
        """
        context: Context = session.memory
        if heads is None:
            mass = torch.zeros(1, context.length)
        else:
            mass = context.mass(prompts.search_question(self.model, question), heads)
        # Tokens of the template are nobody's passage.
        mass[:, : session.head] = 0
        votes, words = page_mass(mass), None
        if lexical or heads is None:
            words = torch.from_numpy(self._lexical(session).scores(question))
            if heads is not None:
                # A page that the context dropped can't be read: words alone must not choose it.
                words = torch.where(votes.sum(0) > 0, words, torch.zeros_like(words))
        pages = choose_pages(votes, count, words, LEXICAL_WEIGHT)
        citations, passages = self._cite(session, pages, reach)
        found = self.ranked(session, mass.mean(0), passages)
        return Chosen(pages, citations, _weighed(session, found, question) if lexical else found)

    def pages_text(self, session: Session, first: int, last: int) -> list[Passage]:
        """Return the passages of the pages `first .. last - 1` of a session's context."""
        stop = min(last * PAGE, session.memory.length)
        return session.passages(max(0, first * PAGE) - session.head, stop - session.head)

    def _cite(self, session: Session, pages: list[Choice], reach: int) -> tuple[list[Citation], list[Passage]]:
        """Return the passages of the chosen pages; a page within a better one's passage is part of it."""
        citations: list[Citation] = []
        passages: list[Passage] = []
        covered: set[int] = set()
        cited = _Cited()
        final = max(0, session.memory.length - 1) // PAGE
        for choice in pages:
            if choice.page in covered:
                continue
            # What a better passage holds already is not told twice.
            first = last = choice.page
            while first > max(0, choice.page - reach) and first - 1 not in covered:
                first -= 1
            while last < min(choice.page + reach, final) and last + 1 not in covered:
                last += 1
            covered.update(range(first, last + 1))
            for passage in self.pages_text(session, first, last + 1):
                passages.append(passage)
                document = session.documents[passage.document]
                start, end = cited.add(passage, document.text)
                if start < end:
                    text, score = document.text[start:end], round(choice.score, 4)
                    source = "words" if choice.by == "lexical" else "retrieval"
                    citations.append(Citation(document.name, start, end, text, score, choice.by, source=source))
        return citations, passages

    def ranked(self, session: Session, mass: Tensor, passages: list[Passage]) -> list[Sentence]:
        """Return the sentences that the passages touch, by the attention that fell on them.

        Args:
            session: whose documents they are of.
            mass: `[N]`, of each token of the session's context.
            passages: of its documents.
        """
        found: dict[tuple[int, int], Sentence] = {}
        for passage in passages:
            document = session.documents[passage.document]
            own = mass[session.head + document.first : session.head + document.last]
            spans = sentences.split(document.text, passage.start, passage.end)
            for sentence in sentences.rank(own, session.offsets, document.first, passage.document, spans):
                found[sentence.document, sentence.start] = sentence
        return sorted(found.values(), key=lambda sentence: -sentence.mass)

    def _lexical(self, session: Session) -> LexicalIndex:
        """Return the lexical index over the pages of the session's context."""
        length = session.memory.length
        known = self._index
        # A weak reference: another session at a freed address must not be taken for this one.
        if known is None or known[0]() is not session or known[1] != length:
            pages = [
                " ".join(passage.text for passage in self.pages_text(session, page, page + 1))
                for page in range(-(-length // PAGE))
            ]
            known = self._index = (weakref.ref(session), length, LexicalIndex(pages))
        return known[2]


class _Cited:
    """Passages grown to whole words; the word between two neighbours belongs to the better one."""

    def __init__(self) -> None:
        """Begin with none."""
        self._taken: list[tuple[Passage, int, int]] = []

    def add(self, passage: Passage, text: str) -> tuple[int, int]:
        """Return where a passage begins and ends in its document's text (both the same: nothing is left of it)."""
        start, end = whole_words(text, passage.start, passage.end)
        for other, first, last in self._taken:
            if other.document != passage.document:
                continue
            if other.start < passage.start:
                start = max(start, last)
            else:
                end = min(end, first)
        end = max(start, end)
        self._taken.append((passage, start, end))
        return start, end


def _weighed(session: Session, found: list[Sentence], question: str) -> list[Sentence]:
    """Return sentences ranked by attention and words: up to twice the mass for the one that holds most of the question.

    Heads see sentences of one form alike: that one has the question's own rare word decides (docs/experiments.md).
    """
    texts = [session.documents[s.document].text[s.start : s.end] for s in found]
    words = LexicalIndex(texts).scores(question)
    most = float(words.max()) if texts else 0.0
    if most <= 0:
        return found
    shares = [float(word) / most for word in words]
    if any(s.mass for s in found):
        weighed = [replace(s, mass=s.mass * (1 + share)) for s, share in zip(found, shares, strict=True)]
    else:  # no heads: words rank alone
        weighed = [replace(s, mass=share) for s, share in zip(found, shares, strict=True)]
    return sorted(weighed, key=lambda sentence: -sentence.mass)
