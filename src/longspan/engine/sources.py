"""Which sentences of the text an answer was read from, by the attention of the tokens that wrote it.

The source of an answer is where the model's retrieval heads looked while they wrote it. With T queries that wrote the
answer (the last one of the prompt, then each token of the answer), retrieval heads H and the weights w of the mechanism
itself, over everything that it read, its own prompt and sinks included:

    mass_j = 1 / (|H| T) sum_{h in H} sum_{t in T} w_htj            of token j of the text, all tokens' at most 1
    mass(s) = sum of mass_j over the tokens of the sentence s

Only sentences that stand out are named (`standing_out`): where heads find nothing they look at sinks, and no sentence
has much. Copying heads look at what is written next (Retrieval Head Mechanistically Explains Long-Context Factuality,
arXiv 2404.15574); that attention of well-chosen heads attributes as well as taking text away does is from AT2 (Learning
to Attribute with Attention, arXiv 2504.13752). docs/citations.md has the variants that were tried.

Queries are noted while the answer is written, which costs nothing; one product at its end gives the weights
(`attention/masses.py`). It does not know whether an answer is right: a wrong one has sources too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention import masses
from longspan.engine.generation import Citation
from longspan.engine.readers import read_by
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel
from longspan.retrieval import sentences
from longspan.retrieval.choose import page_mass
from longspan.retrieval.heads import RetrievalHeads
from longspan.retrieval.sentences import Sentence
from longspan.sessions.session import Session

if TYPE_CHECKING:
    from longspan.engine.choosing import Chooser, Chosen
    from longspan.engine.kv_context import KVContext
    from longspan.engine.stepper import Stepper

MOST = 3
"""Sentences that are named at most: more that are alike are no source."""
FLOOR = 0.1
"""Mass of a sentence below which it is not named: right answers had 0.29 and more, invented ones mostly less than 0.1
(docs/experiments.md)."""
SHARE = 0.3
"""Of the best sentence's mass that another must have to be named beside it."""
_PAGES = 8
"""Pages of most mass whose sentences are looked at."""


class Noted:
    """The queries of some layers while an answer is written: of every call, that of the newest token."""

    def __init__(self, layers: Sequence[int]) -> None:
        """Take the layers, counted among those that attend."""
        self.layers = tuple(sorted(set(layers)))
        self.scales: dict[int, float] = {}
        self._queries: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}

    def over(self, reader: Reader) -> Reader:
        """Return a reader that notes, and reads as the given one does."""
        return _Noting(reader, self)

    def add(self, layer: int, q: Tensor, scale: float) -> None:
        """Note a layer's unrotated queries `[1, Hq, T, D]`; `scale` is what scores are multiplied by."""
        self.scales[layer] = scale
        self._queries[layer].append(q)

    def fork(self) -> Noted:
        """Return what goes on from here by itself: another answer after the same prompt."""
        other = Noted(self.layers)
        other.scales = dict(self.scales)
        other._queries = {layer: list(queries) for layer, queries in self._queries.items()}
        return other

    def after(self, steps: Stepper) -> None:
        """Note what a step of one shape had noted."""
        for layer in self.layers:
            self.add(layer, *steps.noted(layer, 1))

    def last(self, layer: int, count: int) -> Tensor:
        """Return the last `count` queries of a layer, `[1, Hq, count, D]`."""
        return torch.cat(self._queries[layer][-count:], 2)[:, :, -count:]


@dataclass(frozen=True)
class _Noting:
    """See `hf.attention.Reader`."""

    reader: Reader
    noted: Noted

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer in self.noted.layers:
            self.noted.add(layer, q[:, :, -1:], scale)
        return self.reader.attend(layer, q, k, v, scale)


def mass(context: KVContext, noted: Noted, heads: RetrievalHeads, count: int) -> Tensor:
    """Return the mass of every token that a context holds.

    Args:
        context: that the answer was written on, with the answer's tokens still there.
        noted: queries of the layers of `heads`.
        heads: whose attention counts.
        count: the last tokens that wrote the answer: the prompt's last, and each of the answer that was read.

    Returns:
        float32 `[N]` on the CPU; all of it is at most 1.
    """
    found = torch.zeros(context.length)
    for layer in noted.layers:
        own = [head for at, head in heads.heads if at == layer]
        q, scale = noted.last(layer, count), noted.scales[layer]
        kept = context.answers_from
        if kept is not None:
            read = masses.reads_of_rows(kept.mechanism, q, kept.layers[layer], own, scale=scale)
        else:
            hints = replace(context.hints, layer=layer)
            kv = context.layers[layer]
            read = masses.reads(read_by(context.mechanism, kv), q, kv, own, scale=scale, hints=hints)
        found += read.sum(0).cpu()
    return found / (count * len(heads.heads))


def in_documents(mass: Tensor, session: Session, chooser: Chooser) -> list[Sentence]:
    """Return sentences of a session's documents by their mass, best first.

    Args:
        mass: of every token of the session's context, the template's at its head and those behind it included.
        session: with its memory.
        chooser: ranks sentences.
    """
    own = mass[: session.head + len(session.tokens)].clone()
    own[: session.head] = 0
    pages = page_mass(own.unsqueeze(0))[0]
    best = pages.topk(min(_PAGES, len(pages))).indices.tolist()
    passages = [passage for page in best for passage in chooser.pages_text(session, page, page + 1)]
    return chooser.ranked(session, own, passages)


def in_prompt(
    mass: Tensor, model: CausalModel, prompt: Sequence[int], session: Session, chosen: Sequence[Sentence]
) -> list[Sentence]:
    """Return chosen sentences of which a prompt reads again by the mass of their tokens there, best first.

    Args:
        mass: of every token of the prompt and what follows it.
        model: whose tokenizer made the prompt.
        prompt: token ids; where their text makes other tokens, nothing is found.
        session: whose documents the sentences are of.
        chosen: sentences, some of which stand in the prompt, on one line or as in the text.
    """
    text: str = model.tokenizer.decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    tokens, offsets = model.tokens_with_offsets(text)
    if tokens != list(prompt):
        return []
    found = []
    for sentence in chosen:
        written = session.documents[sentence.document].text[sentence.start : sentence.end]
        for form in (" ".join(written.split()), written):
            # The last one: an earlier question of the conversation may hold the same words.
            if (at := text.rfind(form)) >= 0:
                own = sentences.rank(mass[: len(prompt)], offsets, 0, sentence.document, [(at, at + len(form))])[0]
                found.append(replace(sentence, mass=own.mass))
                break
    return sorted(found, key=lambda sentence: -sentence.mass)


def standing_out(found: Sequence[Sentence]) -> list[Sentence]:
    """Return of sentences, best first, those that are clearly read more than others; none: nothing stands out.

    Where the best has little mass the answer was not read from the text; where many are alike, no one is its source.
    """
    if not found or found[0].mass < FLOOR:
        return []
    alike = [sentence for sentence in found if sentence.mass >= SHARE * found[0].mass]
    return alike if len(alike) <= MOST else []


def named(
    others: Sequence[Citation],
    session: Session,
    mass: Tensor,
    prompt: Sequence[int],
    chooser: Chooser,
    chosen: Chosen,
    *,
    read_again: bool,
) -> tuple[list[Citation], str]:
    """Return the sentences that an answer was read from before its other citations, and why none stands out.

    Passages that were chosen for the question follow whole, and may hold such a sentence.

    Args:
        others: citations of what was chosen for the question.
        session: that the answer is about.
        mass: of every token of the context that it was written on, from `mass`.
        prompt: what was read for it, after the documents or, where they were read again, alone.
        chooser: ranks sentences.
        chosen: for the question.
        read_again: whether the prompt repeats what was chosen.
    """
    if read_again:
        found = in_prompt(mass, chooser.model, prompt, session, chosen.sentences)
    else:
        found = in_documents(mass, session, chooser)
        others = [replace(each, mass=round(_mass_of(each, session, mass), 4)) for each in others]
    sentences_named = standing_out(found)
    cited: list[Citation] = []
    for each in _cited(session, sentences_named):  # a page may begin within a sentence that the page before ends in
        if not any(each.doc == told.doc and each.start < told.end and told.start < each.end for told in cited):
            cited.append(each)
    same = {(each.doc, each.start, each.end) for each in cited}
    cited += (each for each in others if (each.doc, each.start, each.end) not in same)
    return cited, "" if sentences_named else "no sentence stands out in what the answer was read from"


def _mass_of(cited: Citation, session: Session, mass: Tensor) -> float:
    """Return the mass of a passage of the document of its name that holds its text."""
    for number, document in enumerate(session.documents):
        if document.name == cited.doc and document.text[cited.start : cited.end] == cited.text:
            own = mass[session.head + document.first : session.head + document.last]
            span = [(cited.start, cited.end)]
            return sentences.rank(own, session.offsets, document.first, number, span)[0].mass
    raise AssertionError("a citation is of one of the session's documents")


def _cited(session: Session, found: Sequence[Sentence]) -> list[Citation]:
    cited = []
    for each in found:
        document = session.documents[each.document]
        text, share = document.text[each.start : each.end], round(each.mass, 4)
        cited.append(Citation(document.name, each.start, each.end, text, share, "attention", share, "attention"))
    return cited
