"""A restored session answers while most of its pages are still in the file, and as if all had been read at once."""

import pytest
import torch

from longspan.engine import contexts
from longspan.engine.kv_context import KVContext
from longspan.errors import SessionCorruptError
from longspan.evals.haystack import prose
from longspan.kv.base import PAGE
from longspan.sessions.store import SessionStore
from tiny_llama import SPECS

QUESTION = "What is the code of the tower?"
QUEST = "quest:budget=128,window=64,dense_layers=0"


@pytest.fixture
def no_background(monkeypatch):
    """Pages come when they are read, and not before."""
    monkeypatch.setattr(contexts.Arrivals, "start", lambda self: None)


def ask(llm, session, question=QUESTION):
    return llm.ask(question, session, max_tokens=8).text


def read(llm, text, name="codes"):
    session = llm.session(name)
    llm.add_text(session, text, "codes.txt")
    llm.prefill(session)
    return session


def away(context, part=None):
    planes = [plane for kv in context._layers() for plane in kv.pool.planes]
    return sum(plane.coming.left(part) for plane in planes if plane.coming is not None)


@pytest.mark.parametrize(
    "spec,options",
    [
        *((spec, {}) for spec in (*SPECS, QUEST, "tree:leaves=4,window=64")),
        ("dense", {"kv": "int8"}),
        ("superlinear:window=80,spans=2", {"kv": "fp8"}),
        ("h2o:budget=128,window=32", {}),
        ("snapkv:budget=128,window=32,heads=adaptive", {"kv": "int4"}),
    ],
)
def test_the_same_tokens_as_if_nothing_had_been_saved(make_llm, text, spec, options, no_background):
    llm = make_llm(spec, **options)
    session = read(llm, text * 2)
    llm.save(session)
    other = make_llm(spec, **options)
    restored = other.session("codes")
    assert away(restored.memory)
    assert [ask(other, restored), ask(other, restored, "And the museum?")] == [
        ask(llm, session),
        ask(llm, session, "And the museum?"),
    ]
    # Read on, and saved: the pages that nobody had read yet among them.
    for engine, one in ((llm, session), (other, restored)):
        engine.add_text(one, "The lantern is in the cellar.", "more")
        engine.prefill(one)
    other.save(restored)
    again = make_llm(spec, **options)
    assert ask(again, again.session("codes")) == ask(llm, session)


def test_a_hybrid_model_goes_on_too(models, text, no_background):
    from longspan import LLM

    llm = LLM(models("lfm2")[0], "dense", reuse=False)
    session = read(llm, text)
    llm.save(session)
    other = LLM(llm.model, "dense", reuse=False)
    restored = other.session("codes")
    assert away(restored.memory)
    assert ask(other, restored) == ask(llm, session)


@pytest.mark.parametrize("spec", ["superlinear:window=80,spans=2", QUEST])
def test_what_reads_few_pages_brings_few(make_llm, spec, no_background):
    how = {"prefill": "streaming:window=64", "reuse": False}
    llm = make_llm(spec, **how)
    llm.save(read(llm, prose()[:8_000]))
    memory = make_llm(spec, **how).session("codes").memory
    held, kept = sum(kv.pages_held for kv in memory.layers), len(memory.layers)
    assert away(memory, "v") == held - kept * bool(memory.length % PAGE), "all but the page that is not full"
    memory.step([5])
    came = held - away(memory, "v")
    assert 0 < came < 0.5 * held


def test_forks_share_what_is_still_to_come_and_a_cut_page_comes_before_it_is_written_to(make_llm, text, no_background):
    llm = make_llm("dense")
    whole = read(llm, text * 2).memory
    expected = [whole.fork(), whole.fork()]
    session = llm.session("codes")
    session.memory = whole
    llm.add_text(session, text * 2, "codes.txt")
    llm.save(session)
    lazy = make_llm("dense").session("codes").memory
    assert isinstance(lazy, KVContext) and away(lazy)
    other = lazy.fork()
    for one, wanted, length in ((other, expected[0], 330), (lazy, expected[1], whole.length)):
        for each in (one, wanted):
            each.truncate(length)
            each.extend([9, 8, 7])
        assert torch.equal(one.step([5, 6]), wanted.step([5, 6]))


def test_a_damaged_page_is_told_where_it_is_read_and_never_answers(make_llm, text):
    llm = make_llm("dense")
    session = read(llm, text * 2)
    expected = ask(llm, session)
    llm.save(session)
    (path,) = (llm.store.root / "codes").iterdir()
    data = path.read_bytes()
    journal = llm.store.opened("codes", path.parent)[0]
    places = journal.places(("tensor", "memory", "1.v"))
    at = int(places.offsets[1]) + 100
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    other = make_llm("dense", reuse=False)
    restored = other.session("codes")  # nothing of that page is read here
    for _ in range(2):
        with pytest.raises(SessionCorruptError, match=r"'codes' is damaged.*fails its checksum") as caught:
            ask(other, restored)
        assert "\n" not in str(caught.value)
    with pytest.raises(SessionCorruptError):
        restored.saved_length = -1
        other.save(restored)
    path.write_bytes(data)
    assert ask(other, restored) == expected, "mended, it answers"


def test_files_that_are_replaced_meanwhile_stay_readable(make_llm, text, no_background):
    llm = make_llm("dense")
    session = read(llm, text)
    llm.save(session)
    restored = make_llm("dense").session("codes")
    SessionStore().restore("codes")  # writes a file of its own and removes the other
    SessionStore().remove("codes")
    assert away(restored.memory)
    assert ask(llm, restored) == ask(llm, session)
