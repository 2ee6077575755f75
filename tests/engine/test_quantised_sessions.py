"""Sessions over quantised pages: saved, restored, forked and read on, and told apart by how they are quantised."""

import pytest
import torch

from longspan import LLM
from longspan.errors import SessionMismatchError, UnknownNameError, UsageError

SPEC = "int4:residual=64,sinks=64,group=64,rotate=false"
QUESTION = "What is the code of the tower?"


def read(llm, text, name="codes"):
    session = llm.session(name)
    llm.add_text(session, text, "codes.txt")
    llm.prefill(session)
    return session


def held(context):
    layers = (
        context.layers if context.kept is None else [group.pages for kv in context.kept.layers for group in kv.groups]
    )
    return [[kv.resolution(page) for page in range(len(kv.table))] for kv in layers]


@pytest.mark.parametrize("kv", ["int8", "int4", SPEC, "int2"])
@pytest.mark.parametrize(
    "attention", ["dense", "quest:budget=192", "tree:window=64", "streaming:window=200", "h2o:budget=300,window=100"]
)
def test_a_session_goes_on_where_it_was_and_a_fork_its_own_way(make_llm, places, text, kv, attention):
    llm = make_llm(attention, kv=kv)
    session = read(llm, text)
    assert any(kv.partition(":")[0] in layer for layer in held(session.memory))
    first = llm.ask(QUESTION, session, max_tokens=12).text
    assert llm.ask(QUESTION, session, max_tokens=12).text == first, "a question leaves no trace"
    llm.save(session)
    other = make_llm(attention, kv=kv)
    restored = other.session("codes")
    assert held(restored.memory) == held(session.memory) and other.prefill(restored).read_tokens == 0
    assert other.ask(QUESTION, restored, max_tokens=12).text == first
    child = other.fork(restored)
    other.add_text(child, "The lantern is in the cellar. " * 20, "more")
    other.prefill(child)
    assert child.memory.length > restored.memory.length
    assert other.ask(QUESTION, restored, max_tokens=12).text == first
    # Read on at once, it is as if it had never been saved.
    llm.add_text(session, "The lantern is in the cellar. " * 20, "more")
    assert llm.ask(QUESTION, session, max_tokens=12).text == other.ask(QUESTION, child, max_tokens=12).text


@pytest.mark.parametrize("other", ["auto", "int8", "int4:group=64", "int4:residual=0"])
def test_a_session_quantised_otherwise_is_refused(make_llm, places, text, other):
    llm = make_llm("dense", kv="int4")
    llm.save(read(llm, text))
    with pytest.raises(SessionMismatchError, match="kv"):
        make_llm("dense", kv=other).session("codes")
    same = make_llm("dense", kv="int4:rotate=TRUE,group=32").session("codes")
    assert same.memory.length > 0, "options at their defaults change nothing"


@pytest.mark.parametrize(
    "kv,error,told",
    [
        ("int5", UnknownNameError, "int8, int4, int3, int2"),
        ("int4:grup=32", UnknownNameError, "by, group, keys, residual, rotate, sinks"),
        ("int4:group=20", UsageError, "16, 32, 64"),
    ],
)
def test_what_is_unknown_is_told_in_a_line(tiny, kv, error, told):
    with pytest.raises(error, match=told) as caught:
        LLM(tiny, "dense", kv=kv)
    assert "\n" not in str(caught.value)


def test_bytes_shrink_from_format_to_format(make_llm, places, text):
    sizes = []
    for kv in ("auto", "fp8", "int8:residual=0,sinks=0", "int4:residual=0,sinks=0", "int2:residual=0,sinks=0"):
        context = read(make_llm("dense", kv=kv), text).memory
        stored = 0
        for layer in context.layers:
            for plane in layer.pool.planes:
                stored += sum(count > 0 for count in plane.references) * plane.page_bytes
            layer.pool.compact()
        assert context.nbytes == stored == sum(layer.pool.nbytes for layer in context.layers)
        sizes.append(context.nbytes)
    auto, fp8, int8, int4, int2 = sizes
    assert auto > int8 > int4 > int2 and auto > fp8 > int4, (
        "with heads of 8 channels int8's steps weigh more than fp8's"
    )


def test_numbers_are_finite_whatever_was_held_in_freed_pages(make_llm, places, text):
    llm = make_llm("dense", kv="int4:residual=0,sinks=0")
    session = read(llm, text)
    for layer in session.memory.layers:
        for plane in layer.pool.planes:
            for tensor in plane.tensors.values():
                tensor[:, plane.free_slots] = float("nan") if tensor.is_floating_point() else 0x7F
    assert session.memory.step([5, 6, 7]).isfinite().all()
    assert torch.isfinite(session.memory.score([5, 6, 7])).all()
