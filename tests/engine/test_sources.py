"""Which sentence an answer was read from, by a model whose attention is known: one of its heads looks at `#` alone."""

import json

import pytest
import torch
from looking import HEADS, MARKED, PLAIN, looking_model

from longspan import LLM
from longspan.attention import parse
from longspan.engine import generation, sources
from longspan.engine.kv_context import KVContext
from longspan.engine.sources import Noted, standing_out
from longspan.hf.loading import load
from longspan.hf.model import CausalModel
from longspan.retrieval.heads import RetrievalHeads
from longspan.retrieval.sentences import Sentence
from tiny_hybrid import save_hybrid
from tiny_llama import WINDOW, save_model

SPECS = (
    "dense",
    "superlinear:window=80,spans=2,summary=bounds",
    "superlinear:window=80,spans=2,gate=routed,summary=bounds",
    "quest:budget=192,window=64",
    "tree:window=64,leaves=2,beam=2",
    "streaming:window=400",
    "retrieval:window=128,pages=2",
    "retrieval:window=128,pages=2,focus=0",
    "retrieval:window=128,pages=2,read=place",
    "snapkv:budget=128,window=16",
    "snapkv:budget=128,window=16,when=question",
    "rocketkv:budget=64,window=16",
)


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    return looking_model(tmp_path_factory.mktemp("looking"))


@pytest.fixture
def writes(monkeypatch, looking):
    """Makes the model write an answer, whatever its logits."""

    class Forced:
        def __init__(self, params, device):
            self.left = [*looking.tokens("The code is 7315."), next(iter(looking.end_tokens))]

        def __call__(self, logits, history):
            return self.left.pop(0)

    monkeypatch.setattr(generation, "Sampler", Forced)


@pytest.fixture
def make(looking, writes):
    def made(spec, **options):
        llm = LLM(looking, spec, **options)
        llm._heads = HEADS
        return llm

    return made


def session_of(llm, marked=True, name=None, before=9, after=24):
    session = llm.session(name)
    text = [PLAIN] * before + ([MARKED] if marked else []) + ["Tom has none."] * after
    llm.add_text(session, " ".join(text), "board")
    llm.prefill(session)
    return session


def named(answer):
    return [each for each in answer.citations if each.source == "attention"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_sentence_that_was_read_is_named_first(make, spec):
    llm = make(spec)
    session = session_of(llm)
    answer = llm.ask("Where is it?", session)
    assert answer.citations[0].text == MARKED and answer.citations[0].doc == "board" and answer.unsourced == ""
    assert len(named(answer)) == 1 and 0.5 < answer.citations[0].mass <= 1.0 + 1e-4
    first = answer.citations[0]
    assert session.documents[0].text[first.start : first.end] == MARKED
    others = answer.citations[1:]
    assert {each.source for each in others} <= {"retrieval", "words"}
    if not spec.startswith("retrieval") or "place" in spec:
        # A page may begin within the sentence; what holds it whole was read with all of its mass.
        assert all(0 <= each.mass <= 1.0 + 1e-4 for each in others)
        assert all(each.mass >= first.mass - 1e-3 for each in others if MARKED in each.text)
    json.dumps([vars(each) for each in answer.citations])
    assert llm.ask("Where is it?", session).citations == answer.citations


@pytest.mark.parametrize(
    "spec", ["dense", "superlinear:window=80,spans=2,summary=bounds", "streaming:window=100", "infini:segment=64"]
)
def test_where_nothing_stands_out_no_source_is_named(make, spec):
    llm = make(spec)
    away = spec.startswith(("streaming", "infini"))  # there the sentence is, and it can't be read alone
    answer = llm.ask("Where is it?", session_of(llm, marked=away))
    assert named(answer) == []
    wanted = "remembers" if spec.startswith("infini") else "stands out"
    assert wanted in answer.unsourced


def test_who_does_not_ask_gets_no_source_and_pays_nothing(make, monkeypatch):
    llm = make("dense", sources=False)
    session = session_of(llm)
    monkeypatch.setattr(sources, "Noted", None)  # nothing is noted
    answer = llm.ask("Where is it?", session)
    assert named(answer) == [] and answer.unsourced == "" and {each.mass for each in answer.citations} == {None}


def test_a_model_without_retrieval_heads_says_so(make, monkeypatch):
    llm = make("dense")
    monkeypatch.setattr(llm, "_headless", True)
    answer = llm.ask("What is the code of the gate?", session_of(llm))
    assert named(answer) == [] and "no retrieval heads" in answer.unsourced
    assert {each.source for each in answer.citations} == {"words"}


@pytest.mark.parametrize(
    "spec", ["dense", "superlinear:window=80,spans=2,summary=bounds", "retrieval:window=128,pages=2"]
)
def test_forks_and_restored_sessions_name_the_same(make, spec):
    llm = make(spec)
    session = session_of(llm, name="kept")
    llm.save(session)
    wanted = named(llm.ask("Where is it?", session))
    fork = llm.fork(session)
    assert named(llm.ask("Where is it?", fork)) == wanted
    llm.add_text(fork, "Nobody had asked for a lantern. " * 5, "other")
    again = make(spec)
    for other in (fork, again.session("kept")):
        found = named(again.ask("Where is it?", other))
        assert [(each.start, each.end) for each in found] == [(each.start, each.end) for each in wanted]


def test_a_stopped_answer_leaves_nothing_behind(make):
    llm = make("dense")
    session = session_of(llm)
    length = session.memory.length
    pieces = llm.generate("Where is it?", session)
    next(pieces)
    assert session.memory.noted is not None
    pieces.close()
    assert session.memory.noted is None and session.memory.length == length and named(pieces.answer) == []


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
@pytest.mark.parametrize("spec", ["dense", "superlinear:window=80,spans=2"])
def test_steps_of_one_shape_note_the_same_queries(tmp_path_factory, family, spec):
    folder = tmp_path_factory.mktemp(family)
    if family == "llama":
        save_model(folder, max_position_embeddings=WINDOW)
    else:
        save_hybrid(folder, family)
    modules = load(str(folder), device="cpu", dtype=torch.float32)
    native = CausalModel(family, modules.model, modules.tokenizer, native=True)
    tokens = torch.randperm(320, generator=torch.Generator().manual_seed(0)).tolist()
    layer = modules.dimensions.layers - 1
    heads, found = RetrievalHeads(((layer, 1), (0, 0))), []
    for model in (native, modules):
        context = KVContext(model, parse(spec))
        context.extend(tokens[:190])
        context.noted = noted = Noted([layer, 0])
        context.step(tokens[190:200])
        for token in tokens[200:206]:
            context.step([token])
        found.append(sources.mass(context, noted, heads, 7))
        assert (context._stepper is not None) == (model is native)
    assert found[0].shape == (206,) and abs(float(found[0].sum()) - 1) < 1e-4
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_what_stands_out():
    def of(*masses):
        return [Sentence(0, i, i + 1, mass) for i, mass in enumerate(masses)]

    assert standing_out([]) == [] == standing_out(of(sources.FLOOR * 0.99))
    assert standing_out(of(0.5, 0.4, 0.1)) == of(0.5, 0.4)
    assert standing_out(of(0.2, 0.19, 0.18)) == of(0.2, 0.19, 0.18)
    assert standing_out(of(0.2, 0.19, 0.18, 0.17)) == []
