"""Reading less than the whole context: what is chosen, what is summed up, and that lengths stay right."""

import re

import pytest

from longspan.errors import UsageError
from longspan.evals.asking.asker import Identity, Reply
from longspan.evals.asking.local import Local
from longspan.evals.asking.readers import reading
from longspan.evals.asking.rows import row_of
from longspan.evals.asking.run import Given, plan, run
from longspan.evals.journal import Journal
from longspan.evals.questions import pieces, readings
from longspan.evals.questions.example import Template
from longspan.evals.questions.making import example, length_of
from longspan.evals.questions.passages import shipped
from longspan.evals.questions.registry import evaluation
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources

SOURCES = Sources(essay=" ".join(shipped()[0].documents))


class Reader:
    """Keeps what it is asked, and answers with what stands in the context."""

    template, counted_by, parallel, measures, chooses = Template("<|user|>", "<|end|>"), "words", 1, False, False
    identity = Identity("reader", "none", "", "all", "", "all")

    def __init__(self, error=""):
        self.asked, self.error = [], error

    def tokens(self, text):
        return text.split()

    def ask(self, made, tick):
        self.asked.append(made)
        assert length_of(made, self.tokens) == made.tokens, "lengths are those of what is asked"
        if self.error:
            return Reply("", error=self.error)
        if not made.outputs:  # a summary
            return Reply(f"sum {len(self.asked)}\nof it", read_tokens=10, read_seconds=1.0, decode_seconds=0.5)
        found = [output for output in made.outputs if output in made.context]
        return Reply(" ".join(found), read_tokens=7, read_seconds=2.0, measures={"prompt_tokens": 9.0})


def made_for(asker, name, task, length=1500, index=0, **setup):
    return example(
        evaluation(name), task, asker.tokens, length, index, 3, template=asker.template, sources=SOURCES,
        setup=Setup(**setup),
    )  # fmt: skip


def test_all_of_it_is_read_by_the_asker_itself():
    asker = Reader()
    assert reading(asker, readings.parse("full")) is asker


@pytest.mark.parametrize(
    "name, task",
    [
        ("ruler", "niah_single_2"),
        ("ruler", "niah_multikey_2"),
        ("passkey", "passkey"),
        ("rot", "coherent_4"),
        ("ruler", "qa_1"),
        ("nolima", "literal"),
    ],
)
@pytest.mark.parametrize("place", ["after", "before"])
def test_what_is_retrieved_holds_the_needle_and_little_else(name, task, place):
    right = 0
    for index in range(6):
        asker = Reader()
        made = made_for(asker, name, task, index=index, question=place)
        reply = reading(asker, readings.parse("retrieved:passages=4")).ask(made, lambda *_: None)
        (asked,) = asker.asked
        assert asked.context.startswith(made.head) and asked.asked == made.asked and asked.question == made.question
        told = pieces.split(asked.context[len(made.head) :]).texts
        whole = list(pieces.split(made.context[len(made.head) :]).texts)
        assert len([text for text in told if text]) <= 4 and asked.tokens < made.tokens
        body = asked.context[len(made.head) :]
        kept = [text for text in whole if text in body]
        assert reply.measures["chosen_passages"] <= 4 and reply.measures["prompt_tokens"] == 9 and kept
        assert [whole.index(text) for text in kept] == sorted(whole.index(text) for text in kept), "in their own order"
        right += any(output in reply.text for output in made.outputs)
    assert right >= 5


def test_where_no_word_is_shared_nothing_is_retrieved():
    """A question by association finds nothing by words: that is what the eval is for."""
    asker = Reader()
    found = [
        reading(asker, readings.parse("retrieved")).ask(made_for(asker, "nolima", "onehop", index=i), lambda *_: None)
        for i in range(12)
    ]
    assert sum(bool(reply.text) for reply in found) <= 3


def test_summaries_are_written_chunk_by_chunk_and_asked_about():
    asker = Reader()
    made = made_for(asker, "ruler", "qa_1")
    reply = reading(asker, readings.parse("summary:chunk=300,tokens=20")).ask(made, lambda *_: None)
    *chunks, last = asker.asked
    texts = pieces.split(made.context[len(made.head) :]).texts
    assert 4 <= len(chunks) <= 8 and reply.measures["summaries"] == len(chunks)
    told = "\n\n".join(each.context.removesuffix("\n\n") for each in chunks)
    assert told == "\n\n".join(texts)
    for each in chunks:
        assert each.max_tokens == 20 and each.outputs == () and made.question in each.asked
        assert len(each.context.split()) <= 300 or len(pieces.split(each.context).texts) == 1
    assert last.context == made.head + "\n".join(f"sum {i + 1} of it" for i in range(len(chunks))) + "\n"
    assert last.outputs == made.outputs and last.closing == made.closing
    assert reply.read_tokens == 10 * len(chunks) + 7 and reply.read_seconds == 1.5 * len(chunks) + 2
    asker = Reader()
    reading(asker, readings.parse("summary:chunk=300,focused=false")).ask(made, lambda *_: None)
    assert all(made.question not in each.asked for each in asker.asked[:-1])


def test_no_answer_for_a_chunk_is_no_answer():
    asker = Reader(error="too long")
    made = made_for(asker, "ruler", "qa_1")
    assert reading(asker, readings.parse("summary")).ask(made, lambda *_: None).error == "too long"
    assert len(asker.asked) == 1


def test_a_row_says_how_it_was_read():
    given = Given(
        evaluation("rot"), ["coherent_0"], [900], 2, 0, SOURCES, Setup("both", context="retrieved:passages=3")
    )
    asker = Reader()
    with Journal(None) as journal:
        run(given, plan(given, lambda _: [asker]), journal, {}, lambda _: None)
        found = [row_of(entry) for entry in journal.entries]
    assert {row.setup for row in found} == {"question=both,context=retrieved:passages=3"}
    assert all(row.read_tokens == 7 and row.tokens > 850 and row.measures["chosen_passages"] == 3 for row in found)
    assert Setup(context="retrieved:passages=8").describe() == "context=retrieved"


@pytest.mark.parametrize("spec", ["retrieved:by=heads,passages=3", "retrieved", "summary:chunk=200,tokens=12"])
def test_a_model_here_reads_so(make_llm, tiny, spec):
    asker = Local(make_llm("dense"))
    made = made_for(asker, "ruler", "qa_1", length=1400)
    reply = reading(asker, readings.parse(spec)).ask(made, lambda *_: None)
    assert reply.decoded_tokens > 0 and reply.attention == "dense"
    if spec.startswith("retrieved"):
        assert reply.read_tokens < 1200 and 1 <= reply.measures["chosen_passages"] <= 8
    else:
        assert reply.measures["summaries"] > 3 and reply.read_tokens > 1000


def test_heads_choose_stretches_of_the_text(make_llm):
    asker = Local(make_llm("dense"))
    text = "The lamp is red and was lit in May. " * 3 + "Nobody had told the miller about the flood. " * 3
    found = asker.choose(text, "Who was told about the flood?")
    assert found and all(0 <= start < end <= len(text) for start, end in found)
    assert all(re.fullmatch(r"The lamp.*May\.|Nobody.*flood\.", text[start:end]) for start, end in found)


def test_a_place_in_the_text_is_in_a_passage():
    split = pieces.split("ab\nc\ndef\ng\n")
    text = split.joined(range(4))
    assert [split.at(i) for i in range(len(text))] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert split.at(99) == 3


def test_the_models_states_choose_passages_and_both_rankings_together(tiny, make_llm):
    asker = Local(make_llm("dense"))
    made = made_for(asker, "ruler", "niah_multikey_2")
    texts = pieces.split(made.context[len(made.head) :]).texts
    alike = asker.alike(texts, made.question)
    assert sorted(alike) == list(range(len(texts)))
    assert asker.alike([*texts[:20], made.question, *texts[20:]], made.question)[0] == 20, "nothing is more like it"

    kept = {}
    for by in ("lexical", "dense", "hybrid"):
        inner = Reader()
        inner.chooses, inner.tokens, inner.alike = True, asker.tokens, lambda *_: alike
        inner.template = asker.template
        reading(inner, readings.parse(f"retrieved:by={by},passages=4")).ask(made, lambda *_: None)
        told = pieces.split(inner.asked[0].context[len(made.head) :]).texts
        kept[by] = {texts.index(text) for text in told}
    words = pieces.best(texts, made.question, 4)
    assert kept["lexical"] == set(words) and kept["dense"] == set(alike[:4])
    assert len(kept["hybrid"]) == 4 and kept["hybrid"] & (set(words) | set(alike[:3]))


@pytest.mark.parametrize("by", ["dense", "hybrid", "heads"])
def test_who_shows_no_states_can_only_be_asked_by_words(by):
    with pytest.raises(UsageError, match=f"by={by} needs a model's heads or states.*use by=lexical"):
        reading(Reader(), readings.parse(f"retrieved:by={by}"))
