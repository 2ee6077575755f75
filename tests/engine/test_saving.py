"""A session that is saved and restored goes on as if nothing had been; what does not match is refused."""

import errno
import os

import pytest
import torch

from longspan import LLM
from longspan.errors import SaveError, SessionCorruptError, SessionMismatchError, UsageError
from longspan.hf.loading import load
from longspan.sessions.store import SessionStore
from tiny_llama import CHUNK, SPECS, WINDOW, save_model

QUESTION = "What is the code of the tower?"


def ask(llm, session, question=QUESTION):
    return llm.ask(question, session, max_tokens=20).text


def read(llm, text, name="codes"):
    session = llm.session(name)
    llm.add_text(session, text, "codes.txt")
    llm.prefill(session)
    return session


def files(folder):
    """What each file holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journal(llm):
    (path,) = (llm.store.root / "codes").iterdir()
    return path


@pytest.mark.parametrize("spec", [*SPECS, None])
def test_a_restored_session_goes_on_with_the_same_tokens(make_llm, text, spec):
    llm = make_llm(spec)
    session = read(llm, text)
    expected = [ask(llm, session), ask(llm, session, "And the museum?")]
    llm.save(session)
    other = make_llm(spec, store=SessionStore())
    restored = other.session("codes")
    assert restored.name == "codes"
    assert restored.documents == session.documents and restored.offsets == session.offsets
    assert restored.memory.tokens == session.memory.tokens and restored.head == session.head
    assert other.prefill(restored).read_tokens == 0
    assert [ask(other, restored), ask(other, restored, "And the museum?")] == expected
    first, second = llm.ask(QUESTION, session, max_tokens=4), other.ask(QUESTION, restored, max_tokens=4)
    assert first.citations == second.citations
    # Both are read on.
    for engine, one in ((llm, session), (other, restored)):
        engine.add_text(one, "The lantern is in the cellar.", "more")
    assert ask(llm, session) == ask(other, restored)
    assert session.memory.tokens == restored.memory.tokens


@pytest.mark.parametrize("spec", ["dense", "retrieval:window=128,pages=2"])
def test_a_session_saved_half_read_is_read_on(make_llm, text, spec):
    llm = make_llm(spec)
    expected = ask(llm, read(llm, text, None))
    session = llm.session("half")
    llm.add_text(session, text, "codes.txt")

    def stop(what, done, total):
        if done >= CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(Exception, match=f"after {CHUNK} of"):
        llm.prefill(session, stop)
    llm.save(session)
    other = make_llm(spec)
    restored = other.session("half")
    assert restored.memory.length == CHUNK
    assert ask(other, restored) == expected


def test_turns_and_unread_documents_are_saved(make_llm, text):
    llm = make_llm("dense")
    session = llm.session("codes")
    llm.save(session)
    assert make_llm("dense").session("codes").documents == []
    llm.add_text(session, text, "codes.txt")
    llm.save(session)
    restored = make_llm("dense").session("codes")
    assert restored.memory is None and restored.documents == session.documents
    llm.ask(QUESTION, restored, max_tokens=5, remember=True)
    llm.save(restored)
    again = make_llm("dense").session("codes")
    assert again.turns == restored.turns and len(again.turns) == 1
    assert ask(llm, again) == ask(llm, restored)


def test_a_session_without_a_name_is_not_saved(make_llm):
    llm = make_llm("dense")
    with pytest.raises(UsageError, match="NAME"):
        llm.save(llm.session())
    with pytest.raises(UsageError, match="name"):
        llm.session("../escape")


# --- what does not match --------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["streaming:window=100,sinks=4", "dense", "retrieval", None])
def test_another_attention_is_refused(make_llm, text, other):
    llm = make_llm("streaming:window=100,sinks=8")
    llm.save(read(llm, text[:300]))
    with pytest.raises(SessionMismatchError, match="attention") as caught:
        make_llm(other).session("codes")
    assert "\n" not in str(caught.value)
    assert make_llm("streaming:sinks=8,window=100").session("codes").memory.length > 0


PREFILL, FP8 = {"prefill": "streaming:window=64"}, {"kv": "fp8"}


@pytest.mark.parametrize(
    "saved,asked,told",
    [
        (FP8, {}, 'kv = "fp8", and no kv is'),
        ({}, FP8, 'no kv, and kv = "fp8" is'),
        (FP8, {"kv": "fp16"}, 'kv = "fp8", and kv = "fp16" is'),
        (PREFILL, {}, 'prefill = "streaming:window=64", and no prefill is'),
        (FP8 | PREFILL, FP8, 'prefill = "streaming:window=64", and no prefill is'),
        (PREFILL, {"prefill": "streaming:window=65"}, 'and prefill = "streaming:window=65" is'),
    ],
)
def test_the_option_that_differs_is_named(make_llm, text, saved, asked, told):
    llm = make_llm("dense", **saved)
    llm.save(read(llm, text[:300]))
    assert make_llm("dense", **saved).session("codes").memory.length > 0
    with pytest.raises(SessionMismatchError) as caught:
        make_llm("dense", **asked).session("codes")
    assert told in str(caught.value) and "attention" not in str(caught.value)


def test_automatic_kv_is_none(make_llm, text):
    llm = make_llm("dense", kv="auto")
    llm.save(read(llm, text[:300]))
    assert make_llm("dense").session("codes").memory.length > 0


def test_another_model_is_refused(make_llm, text, tmp_path):
    llm = make_llm("dense")
    llm.save(read(llm, text[:300]))
    model = load(str(save_model(tmp_path / "other", seed=1, max_position_embeddings=WINDOW)), dtype=torch.float32)
    with pytest.raises(SessionMismatchError, match="model"):
        LLM(model, "dense").session("codes")


def test_another_number_type_is_refused(make_llm, text, folder):
    llm = make_llm("dense")
    llm.save(read(llm, text[:300]))
    model = load(str(folder), device="cpu", dtype=torch.float16)
    assert llm.store.show("codes").identity["dtype"] == "float32"
    with pytest.raises(SessionMismatchError):
        LLM(model, "dense").session("codes")
    # The type alone is enough for that.
    model.__dict__["fingerprint"] = llm.model.fingerprint
    with pytest.raises(SessionMismatchError, match="dtype"):
        LLM(model, "dense").session("codes")


# --- damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove"])
@pytest.mark.parametrize("spec", ["dense", "retrieval:window=128,pages=2"])
def test_a_damaged_memory_is_refused(make_llm, text, spec, spoil):
    llm = make_llm(spec)
    session = read(llm, text[:300])
    expected = ask(llm, session)
    llm.save(session)
    blob = journal(llm)
    data = bytearray(blob.read_bytes())
    if spoil == "flip":
        data[len(data) // 2] ^= 1  # of a page: documents are few bytes in front, the commit few behind
        blob.write_bytes(data)
    elif spoil == "cut":
        blob.write_bytes(data[:-1])
    else:
        blob.unlink()
    with pytest.raises(SessionCorruptError, match="codes"):
        other = make_llm(spec)
        ask(other, other.session("codes"))
    # What is in memory is whole, and can be saved over the damage under another name.
    session.name, session.saved_length = "again", -1
    llm.save(session)
    assert ask(llm, make_llm(spec).session("again")) == expected


def fill_disk(patch, free):
    """The disk takes `free` bytes more, then it is full."""
    real, left = os.write, free

    def write(handle, data):
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return real(handle, data)

    patch.setattr(os, "write", write)


@pytest.mark.parametrize("free", [0, 5000, 30_000])
def test_a_full_disk_leaves_what_was_saved(make_llm, text, free, monkeypatch):
    llm = make_llm("dense")
    session = read(llm, text[:300])
    expected = ask(llm, session)
    llm.save(session)
    before = files(llm.store.root / "codes")
    llm.add_text(session, text[300:], "more")
    longer = ask(llm, session)
    with monkeypatch.context() as patch:
        fill_disk(patch, free)
        with pytest.raises(SaveError, match="free some space"):
            llm.save(session)
    assert files(llm.store.root / "codes") == before
    old = make_llm("dense").session("codes")
    assert len(old.documents) == 1 and ask(llm, old) == expected
    # The session in memory is as good as before, and is saved once there is room.
    assert ask(llm, session) == longer
    llm.save(session)
    new = make_llm("dense").session("codes")
    assert len(new.documents) == 2 and ask(llm, new) == longer


def test_a_disk_that_does_not_sync_leaves_what_was_saved(make_llm, text, monkeypatch):
    llm = make_llm("dense")
    session = read(llm, text[:300])
    expected = ask(llm, session)
    llm.save(session)
    llm.add_text(session, text[300:], "more")
    llm.prefill(session)

    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SaveError):
            llm.save(session)
    assert ask(llm, make_llm("dense").session("codes")) == expected


# --- what is not written again --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_a_memory_that_did_not_change_is_not_written_again(make_llm, text, spec):
    llm = make_llm(spec)
    session = read(llm, text)
    llm.save(session)
    whole = journal(llm).stat().st_size
    llm.ask(QUESTION, session, max_tokens=6, remember=True)
    llm.save(session)
    first = journal(llm).stat().st_size - whole
    assert 0 < first < 0.2 * whole, "a turn and a commit"
    other = make_llm(spec)
    restored = other.session("codes")
    assert len(restored.turns) == 1
    other.ask(QUESTION, restored, max_tokens=6, remember=True)
    other.save(restored)
    assert journal(llm).stat().st_size - whole - first < 1.2 * first
    assert len(make_llm(spec).session("codes").turns) == 2


def test_of_a_memory_that_grew_only_what_is_new_is_written(make_llm, text):
    llm = make_llm("dense")
    session = read(llm, text * 2)
    llm.save(session)
    whole = journal(llm).stat().st_size
    llm.add_text(session, text[300:], "more")
    llm.prefill(session)
    llm.save(session)
    assert 0 < journal(llm).stat().st_size - whole < 0.6 * whole
    restored = make_llm("dense").session("codes")
    assert restored.memory.length == session.memory.length
    assert ask(make_llm("dense"), restored) == ask(llm, session)


def test_a_session_removed_meanwhile_is_saved_whole(make_llm, text):
    llm = make_llm("dense")
    session = read(llm, text[:300])
    expected = ask(llm, session)
    llm.save(session)
    make_llm("dense").store.remove("codes")
    llm.save(session)
    assert ask(llm, make_llm("dense").session("codes")) == expected


def test_a_memory_made_anew_with_another_attention_is_written(make_llm, text):
    dense, streaming = make_llm("dense"), make_llm("streaming:window=100,sinks=4")
    session = read(dense, text)
    dense.save(session)
    streaming.prefill(session)
    expected = ask(streaming, session)
    streaming.save(session)
    restored = make_llm("streaming:window=100,sinks=4").session("codes")
    for kept, held in zip(restored.memory.layers, session.memory.layers, strict=True):
        assert kept.pages_held == held.pages_held
        assert torch.equal(kept.keys(kept.length - 50, kept.length), held.keys(held.length - 50, held.length))
    assert ask(streaming, restored) == expected
