"""Answers of a server name the sentences that they were read from, as answers alone do, whoever is answered beside."""

import pytest
import torch
from looking import HEADS, MARKED, PLAIN, looking_model

from longspan import LLM, SamplingParams
from longspan.engine import generation
from longspan.engine.serving import Done, Request, Scheduler

QUESTION = "Where is it?"
SPECS = (
    "dense",
    "superlinear:window=80,spans=2,summary=bounds",
    "tree:window=64,leaves=2,beam=2",
    "streaming:window=400",
    "infini:segment=64",
    "retrieval:window=128,pages=2",
    "retrieval:window=128,pages=2,read=place",
    "snapkv:budget=128,window=16,when=question",
)


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    return looking_model(tmp_path_factory.mktemp("served_looking"))


@pytest.fixture
def says(looking, monkeypatch):
    """Has every answer be one text, whatever the logits: alone by its sampler, and a server's by a constraint."""
    tokens = [*looking.tokens("The code is 7315."), next(iter(looking.end_tokens))]

    class Forced:
        def __init__(self, *_):
            self.left = list(tokens)

        def __call__(self, logits, history):
            return self.left.pop(0)

        def allowed(self):
            return torch.arange(looking.config.vocab_size) == self.left[0]

        def accept(self, token):
            assert self.left.pop(0) == token

    monkeypatch.setattr(generation, "Sampler", Forced)
    return Forced


@pytest.fixture
def serve(looking, says):
    made = []

    def start(spec, **options):
        llm = LLM(looking, spec, **options)
        llm._heads = HEADS
        scheduler = Scheduler(llm)
        scheduler.start()
        made.append(scheduler)
        read = [("board", " ".join([PLAIN] * 9 + [MARKED] + ["Tom has none."] * 24))]
        list(scheduler.submit(Request(documents=read, session="board")))
        return scheduler

    yield start
    for scheduler in made:
        scheduler.close()


def asked(says, session="board", **how):
    question = [{"role": "user", "content": QUESTION}]
    return Request(messages=question, session=session, params=SamplingParams(max_tokens=64), constraint=says, **how)


def ends(handle):
    return [event for event in handle if isinstance(event, Done)]


@pytest.mark.parametrize("spec", SPECS)
def test_served_answers_name_what_answers_alone_name(serve, says, spec):
    scheduler = serve(spec)
    forks = ("east", "west")
    for name in forks:
        scheduler.run(lambda llm, held, name=name: held.hold(llm.fork(held.peek("board"), name))).result(10)
    # Two answers of one request, and two of other sessions, in the same steps.
    handles = [scheduler.submit(asked(says, n=2)), *(scheduler.submit(asked(says, name)) for name in forks)]
    done = [end for handle in handles for end in ends(handle)]
    scheduler.close()
    alone = scheduler.llm.ask(QUESTION, scheduler.llm.session("board"))
    assert len(done) == 4 and alone.citations
    for end in done:
        assert end.unsourced == alone.unsourced
        told = [(each.text, each.source, each.chosen_by) for each in end.citations]
        assert told == [(each.text, each.source, each.chosen_by) for each in alone.citations]
        wanted = [each.mass for each in alone.citations if each.mass is not None]
        assert [each.mass for each in end.citations if each.mass is not None] == pytest.approx(wanted, abs=2e-3)
    if spec.startswith("infini"):
        assert "remembers" in done[0].unsourced
    else:
        assert (done[0].citations[0].text, done[0].citations[0].source) == (MARKED, "attention")


def test_who_asks_for_no_citations_pays_nothing(serve, says, monkeypatch):
    scheduler = serve("dense")
    monkeypatch.setattr("longspan.engine.answering.Noted", None)  # nothing is noted
    assert ends(scheduler.submit(asked(says, citations=False)))[0].citations == ()
    with pytest.raises(Exception, match="NoneType"):
        ends(scheduler.submit(asked(says)))
    monkeypatch.undo()
    quiet = serve("dense", sources=False)
    monkeypatch.setattr("longspan.engine.answering.Noted", None)
    assert {each.source for each in ends(quiet.submit(asked(says)))[0].citations} <= {"retrieval", "words"}


def test_what_is_noted_goes_with_the_answer(serve, says):
    scheduler = serve("dense")
    ends(scheduler.submit(asked(says, n=2)))
    memory = scheduler.run(lambda llm, held: held.peek("board").memory, "board").result(10)
    assert memory.noted is None and memory.length == len(memory.tokens)
