"""What is cited: whole words of the document, each passage once."""

import re
from types import SimpleNamespace

import pytest
import torch

from longspan.engine.choosing import Chooser, Chosen, _weighed
from longspan.kv.base import PAGE
from longspan.retrieval.choose import Choice
from longspan.retrieval.sentences import Sentence
from longspan.retrieval.words import cuts
from longspan.sessions.session import Session

LATIN = " ".join(f"unforgettable{i} half-open{i * 7919} 12,{i:03}.5" for i in range(60))
HAN = "渡船每天九点离开港口，" * 60


def session_of(tiny, *texts):
    session = Session()
    for i, text in enumerate(texts):
        session.add_document(f"doc{i}", text, *tiny.tokens_with_offsets(text), tiny.tokens("\n\n"))
    session.memory = SimpleNamespace(length=len(session.tokens))  # all that citing asks of a context
    return session


@pytest.mark.parametrize("texts", [(LATIN,), (HAN,), (LATIN[:-3], HAN, "Riga", LATIN)])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("reach", [0, 1])
def test_citations_are_whole_words_of_the_document_and_told_once(tiny, texts, order, reach):
    session = session_of(tiny, *texts)
    pages = list(range(-(-len(session.tokens) // PAGE)))[::order]
    citations, passages = Chooser(tiny)._cite(session, [Choice(page, 0.5, "heads") for page in pages], reach)
    assert any(cuts(texts[p.document], p.start) for p in passages) or HAN in texts, "tokens end with words: no test"
    told = {document.name: set() for document in session.documents}
    for citation in citations:
        text = texts[int(citation.doc[3:])]
        assert citation.text == text[citation.start : citation.end] != ""
        assert not cuts(text, citation.start) and not cuts(text, citation.end)
        characters = set(range(citation.start, citation.end))
        assert not characters & told[citation.doc], "told twice"
        told[citation.doc] |= characters
    for i, text in enumerate(texts):
        assert told[f"doc{i}"] == set(range(len(text))), "every page was cited, and so is every character"


def test_the_word_between_two_passages_belongs_to_the_better(tiny):
    session = session_of(tiny, LATIN)
    first, second = (Chooser(tiny).pages_text(session, page, page + 1)[0] for page in (1, 2))
    assert cuts(LATIN, second.start), "the page ends with a word: no test"
    word = next(m for m in re.finditer(r"\S+", LATIN) if m.start() < second.start < m.end())
    for order in ((1, 2), (2, 1)):
        citations, _ = Chooser(tiny)._cite(session, [Choice(page, 0.5, "heads") for page in order], 0)
        assert citations[0].text.count(word.group()) == 1
        assert word.group() not in citations[1].text
        assert min(c.start for c in citations) <= first.start and max(c.end for c in citations) >= second.end


def test_sentences_are_ranked_by_words_where_no_head_looked(tiny):
    session = session_of(
        tiny, "The ferry to Riga leaves at nine. The gate of the yard has a code. Nobody keeps a spare key here."
    )
    chooser = Chooser(tiny)
    _, passages = chooser._cite(session, [Choice(0, 1.0, "lexical")], 1)
    found = chooser.ranked(session, torch.zeros(len(session.tokens)), passages)
    chosen = Chosen([], [], _weighed(session, found, "What code has the gate?"))
    assert chosen.clear(session, 3, "What code has the gate?") == ["The gate of the yard has a code."]


def test_a_sentence_that_stands_there_twice_is_told_once(tiny):
    session = session_of(tiny, "The ferry to Riga leaves at nine. " * 3 + "The gate of the yard has a code.")
    found = [Sentence(0, 34 * i, 34 * i + 33, 0.9) for i in range(3)] + [Sentence(0, 102, 134, 0.3)]
    assert Chosen([], [], found).clear(session, 2, "Who is there?") == [
        "The ferry to Riga leaves at nine.",
        "The gate of the yard has a code.",
    ]
    assert Chosen([], [], found[:3] + [Sentence(0, 102, 134, 0.2)]).clear(session, 2, "Who is there?") == [
        "The ferry to Riga leaves at nine."
    ]
    assert Chosen([], [], []).clear(session, 2, "Who is there?") == []


def test_a_sentence_with_every_word_of_the_question_is_read_alone(tiny):
    session = session_of(tiny, "The gate of the yard has a code. The ferry to Riga leaves at nine.")
    found = [Sentence(0, 0, 32, 0.9), Sentence(0, 33, 66, 0.8)]
    chosen = Chosen([], [], found)
    assert chosen.clear(session, 2, "Which code has the gate of the yard?") == ["The gate of the yard has a code."]
    for other in ("Which code has the gate of Riga?", "Which code has the gate, and when does the ferry leave?"):
        assert len(chosen.clear(session, 2, other)) == 2


def test_neighbours_end_where_the_context_does(tiny):
    session = session_of(tiny, LATIN)
    citations, _ = Chooser(tiny)._cite(session, [Choice(1, 0.5, "heads")], 1 << 40)
    assert [(each.start, each.end) for each in citations] == [(0, len(LATIN))]
