"""Answers of every mechanism are checked against the text, which is quoted after those that do not rest on it."""

import pytest

from longspan.engine import generation
from longspan.engine.generation import Answer, Citation, Stats
from longspan.engine.quoting import quotation
from tiny_llama import SPECS

QUESTION = "What is the code of the gate?"
FACT = "The code of the gate is 7315."


@pytest.fixture(params=[*SPECS, "retrieval:window=128,pages=2,focus=0"])
def spec(request):
    return request.param


@pytest.fixture
def says(tiny, monkeypatch):
    """Makes the model write these words, whatever its logits."""

    def force(words):
        class Forced:
            def __init__(self, params, device):
                self.left = [*tiny.tokens(words), next(iter(tiny.end_tokens))]

            def __call__(self, logits, history):
                return self.left.pop(0)

        monkeypatch.setattr(generation, "Sampler", Forced)

    return force


def hidden(llm):
    session = llm.session()
    llm.add_text(session, "Lise keeps the spare key. " * 8 + FACT + " Tom has none." * 8, "board")
    return session


def test_what_the_model_made_up_is_followed_by_the_text(make_llm, spec):
    # Random weights make everything up.
    llm = make_llm(spec)
    session = hidden(llm)
    pieces = llm.generate(QUESTION, session, max_tokens=6)
    answer = pieces.answer
    assert "".join(pieces) == answer.text == answer.own_words + answer.quote
    assert answer.quote.startswith("\n\nThe text says: “") and len(answer.own_words) > 2
    where = "what it read" if "retrieval" in spec and "place" not in spec else "the passages cited"
    assert answer.notes == [f"the model's own words are not in {where}, so the text is quoted"]
    text = session.documents[0].text
    for quoted in answer.quote.removeprefix("\n\nThe text says: “").removesuffix("”").split("” “"):
        assert quoted in text
    if "focus=0" not in spec:
        assert all(" ".join(text.split()) in answer.quote for text in answer.read_again)


def test_an_answer_from_the_text_stands_alone(make_llm, spec, says):
    llm = make_llm(spec)
    session = hidden(llm)
    says("It is Lise's spare key.")
    answer = llm.ask("Whose is it?", session)
    assert answer.text == "It is Lise's spare key." and answer.quote == "" and answer.notes == []
    says("It is Olga's red lantern.")
    assert llm.ask("Whose is it?", session).quote != ""


def test_nothing_is_quoted_where_it_was_not_wanted(make_llm, spec):
    llm = make_llm(spec)
    session = hidden(llm)
    stopped = llm.ask(QUESTION, session, max_tokens=6, stop=("never said",))
    assert stopped.quote == "" and stopped.notes == [] and stopped.text == stopped.own_words != ""
    silent = make_llm(spec, quote=False)
    assert silent.ask(QUESTION, hidden(silent), max_tokens=6).text == stopped.text
    if "retrieval" in spec:
        silent = make_llm(f"{spec},quote=false")
        assert silent.ask(QUESTION, hidden(silent), max_tokens=6).text == stopped.text


def test_without_documents_there_is_nothing_to_check(make_llm):
    answer = make_llm("dense").ask(QUESTION, max_tokens=6)
    assert answer.quote == "" and answer.notes == []


def test_the_text_is_quoted_where_only_words_choose(make_llm, tiny, monkeypatch):
    llm = make_llm("dense")
    monkeypatch.setattr(llm, "_headless", True)
    answer = llm.ask(QUESTION, hidden(llm), max_tokens=6)
    assert answer.quote == f"\n\nThe text says: “{FACT}”"


def about(text, cited=(), read=()):
    citations = [Citation("board", 0, len(passage), passage, 1.0, "heads") for passage in cited]
    return Answer(text, citations, Stats(), "stop", "dense", "tiny", read_again=list(read))


def test_what_was_read_again_counts_before_what_is_cited():
    answer = about("The otter.", cited=["An otter swims."], read=["A hare runs."])
    quote, note = quotation("Which animal?", answer, ["A hare\n runs."])
    assert quote == "\n\nThe text says: “A hare runs.”" and "what it read" in note
    assert quotation("Which animal?", about("The otter.", cited=["An otter swims."]), ["A hare runs."]) == ("", "")


@pytest.mark.parametrize("answer", [about("The otter."), about("The otter.", cited=["A hare runs."])])
def test_nothing_is_quoted_where_nothing_is_known(answer):
    assert quotation("Which animal?", answer, []) == ("", "")
