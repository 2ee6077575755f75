"""Documents that begin as a saved session does start from there, with the answers of an engine that read everything."""

import pytest
import torch

from longspan import LLM
from longspan.kv.base import PAGE

QUESTION = "What is the code of the tower?"
MORE = " The lantern is in the cellar, and nobody asked for it."


def read(llm, text, name=None):
    session = llm.session(name)
    llm.add_text(session, text, "codes.txt")
    return session, llm.prefill(session)


def ask(llm, session):
    return llm.ask(QUESTION, session, max_tokens=12).text


PARTLY = ["dense", "superlinear:window=80,spans=2", "tree:window=80,leaves=4", "quest:budget=192"]
WHOLE = ["streaming:window=100,sinks=4", "h2o:budget=300,window=100", "retrieval:window=128,pages=2"]


@pytest.mark.parametrize("spec", [*PARTLY, *WHOLE])
def test_the_same_text_is_not_read_twice(make_llm, text, spec):
    llm = make_llm(spec)
    session, stats = read(llm, text, "codes")
    llm.save(session)
    length, expected = session.memory.length, ask(llm, session)
    again, stats = read(make_llm(spec), text)
    assert (stats.cached_tokens, stats.read_tokens) == (length, 0)
    assert ask(llm, again) == expected
    info = llm.store.show("codes")
    assert (info.hits, info.hit_tokens) == (1, length)
    _, stats = read(make_llm(spec, reuse=False), text)
    assert stats.cached_tokens == 0


@pytest.mark.parametrize("spec", [*PARTLY, *WHOLE])
def test_a_text_that_goes_on_otherwise_starts_at_the_last_page_in_common(make_llm, text, spec):
    llm = make_llm(spec)
    session, _ = read(llm, text, "codes")
    llm.save(session)
    for other in (text[:400] + MORE * 4, text[:400] + "!", MORE):
        fresh, _ = read(make_llm(spec, reuse=False), other)
        found, stats = read(llm, other)
        pairs = zip(found.memory.tokens, session.memory.tokens, strict=False)
        common = next(i for i, (a, b) in enumerate(pairs) if a != b)
        assert stats.cached_tokens == (common // PAGE * PAGE if spec in PARTLY else 0)
        assert ask(llm, found) == ask(llm, fresh)


@pytest.mark.parametrize("spec", ["dense", "tree:window=80,leaves=4"])
def test_a_hybrid_model_starts_at_a_checkpoint(nemotron, often, calibrated, text, spec):
    llm = LLM(nemotron, spec)
    session, _ = read(llm, text * 2, "codes")
    llm.save(session)
    fresh, _ = read(LLM(nemotron, spec, reuse=False), text + MORE * 6)
    found, stats = read(LLM(nemotron, spec), text + MORE * 6)
    assert 2 * PAGE <= stats.cached_tokens < found.memory.length
    torch.testing.assert_close(found.memory.step([5, 6]), fresh.memory.step([5, 6]), atol=2e-4, rtol=2e-4)
    assert llm.store.show("codes").hits == 1


@pytest.mark.parametrize(
    "other", [{"attention": "superlinear:window=80,spans=2"}, {"attention": "dense", "kv": "fp16"}]
)
def test_what_reads_otherwise_finds_nothing(make_llm, text, other):
    llm = make_llm("dense")
    llm.save(read(llm, text, "codes")[0])
    assert read(make_llm(**other), text)[1].cached_tokens == 0


def test_quantised_pages_are_taken_whole(make_llm, text):
    llm = make_llm("dense", kv="int4")
    session, _ = read(llm, text, "codes")
    llm.save(session)
    again, stats = read(make_llm("dense", kv="int4"), text)
    assert stats.read_tokens == 0 and ask(llm, again) == ask(llm, session)
    assert read(make_llm("dense", kv="int4"), text[:400] + MORE)[1].cached_tokens == 0


def test_a_damaged_session_is_read_past(make_llm, text):
    llm = make_llm("dense")
    session, _ = read(llm, text, "codes")
    expected = ask(llm, session)
    llm.save(session)
    (path,) = (llm.store.root / "codes").iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found, stats = read(llm, text)
    assert stats.cached_tokens == 0 and ask(llm, found) == expected
