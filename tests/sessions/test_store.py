"""Sessions come back as they were saved, under their own names, to those who ask with the same identity."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longspan.errors import (
    SaveError,
    SessionCorruptError,
    SessionMismatchError,
    SessionNotFoundError,
    UsageError,
)
from longspan.sessions import committing, rows, stored
from longspan.sessions.store import Rows, SessionInfo, SessionStore

SHM = Path("/dev/shm")
IDENTITY = {"model": "abc", "options": {"window": 32, "shape": [1, 2]}, "attention": "dense"}
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float4_e2m1fn_x2,
]  # fmt: skip


def save(store: SessionStore, name: str = "one", tag: int = 1, **kwargs: object) -> Path:
    tensors = {"kv": {"k": torch.full((2, 3), tag), "v": torch.full((3,), float(tag))}, "ids": {"t": torch.tensor(tag)}}
    return store.save(name, IDENTITY, {"tag": tag}, **({"tensors": tensors, "texts": {"d": f"text {tag}"}} | kwargs))


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(torch.Size(shape).numel()) * torch.empty((), dtype=dtype).element_size()
    high = 1 if dtype == torch.bool else 255
    data = torch.tensor(draw(st.lists(st.integers(0, high), min_size=count, max_size=count)), dtype=torch.uint8)
    tensor = data.view(dtype).reshape(shape)
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)  # not contiguous
    return tensor


@settings(max_examples=60, deadline=None)
@given(
    groups=st.dictionaries(
        st.text(max_size=6), st.dictionaries(st.text(max_size=6), tensors(), max_size=4), max_size=3
    ),
    texts=st.dictionaries(st.text(), st.text(st.characters(codec=None)), max_size=3),
)
def test_round_trip(groups: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
        store = SessionStore(Path(folder))
        store.save("s", {}, {}, groups, texts)
        saved = SessionStore(Path(folder)).load("s")
        assert saved.texts == texts
        assert {group: set(held) for group, held in saved.tensors.items()} == {g: set(h) for g, h in groups.items()}
        for group, held in groups.items():
            for name, tensor in held.items():
                assert same(saved.tensors[group][name], tensor), (group, name, tensor)


def test_identity_state_times_and_size(store: SessionStore) -> None:
    before = datetime.now(UTC)
    folder = save(store)
    saved = store.load("one")
    assert (saved.name, saved.identity, saved.state) == ("one", IDENTITY, {"tag": 1})
    assert before <= saved.created == saved.saved <= datetime.now(UTC)
    (journal,) = folder.iterdir()
    assert saved.bytes == journal.stat().st_size and saved.number == 1
    save(store, tag=2)
    again = store.load("one")
    assert again.created == saved.created < again.saved


def test_views_conjugates_and_gradients_are_saved_as_what_they_show(store: SessionStore) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    wide = torch.arange(24.0).reshape(4, 6)
    given_ = {
        "conj": z.conj(),
        "neg": z.conj().imag,
        "step": wide[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(wide),
        "shared": wide[1:],
    }
    store.save("s", {}, {}, {"g": given_}, {})
    loaded = store.load("s").tensors["g"]
    for name, tensor in given_.items():
        assert torch.equal(loaded[name], tensor.detach().resolve_neg()), name
        assert not loaded[name].requires_grad


def test_pieces_larger_than_one_are_joined(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PIECE", 7)
    tensor = torch.arange(1000, dtype=torch.int32)
    store.save("s", {}, {}, {"g": {"t": tensor, "r": Rows(tensor, step=3)}}, {"d": "word " * 100})
    saved = store.load("s")
    assert torch.equal(saved.tensors["g"]["t"], tensor) and torch.equal(saved.tensors["g"]["r"], tensor)
    assert saved.texts["d"] == "word " * 100


def test_overwriting_replaces_everything(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(store, tag=1)
    loaded = store.load("one", lazily=True)
    monkeypatch.setattr(committing, "COMPACTED", 0)
    store.save("one", {"other": 1}, {}, {"new": {"x": torch.zeros(2)}}, {})
    assert len(list(folder.iterdir())) == 1, "what nobody needs is gone"
    saved = store.load("one")
    assert (saved.identity, saved.state, set(saved.tensors), saved.texts) == ({"other": 1}, {}, {"new"}, {})
    assert torch.equal(loaded.tensors["kv"]["k"], torch.full((2, 3), 1))  # from a file that has no name any more


def test_what_is_loaded_may_be_changed_and_saved_again(store: SessionStore) -> None:
    save(store)
    saved = store.load("one")
    store.save("one", IDENTITY, {}, saved.tensors, saved.texts)  # onto the files that it is mapped from
    saved.tensors["kv"]["k"].add_(1)
    assert torch.equal(store.load("one").tensors["kv"]["k"], torch.full((2, 3), 1))
    store.save("one", IDENTITY, {}, saved.tensors, saved.texts)
    assert torch.equal(store.load("one").tensors["kv"]["k"], torch.full((2, 3), 2))


def test_an_unchanged_group_is_kept_and_not_written(store: SessionStore) -> None:
    big = {"kv": {"k": torch.arange(50_000)}}
    folder = save(store, tag=1, tensors=big)
    (journal,) = folder.iterdir()
    for other in (store, SessionStore(store.root)):  # with and without having seen the session
        before = journal.stat().st_size
        save(other, tag=2, tensors={"ids": {"t": torch.tensor(2)}}, unchanged=["kv"])
        saved = other.load("one")
        assert torch.equal(saved.tensors["kv"]["k"], torch.arange(50_000))
        assert saved.tensors["ids"]["t"] == 2
        assert saved.state == {"tag": 2}
        assert 0 < journal.stat().st_size - before < 5000


def test_only_rows_that_changed_are_written(store: SessionStore) -> None:
    pages = torch.rand(3, 40, 64, 8)
    folder = save(store, tensors={"kv": {"k": Rows(pages, 1, 1, range(10, 50))}})
    (journal,) = folder.iterdir()
    before = journal.stat().st_size
    changed = torch.cat([pages[:, 5:], torch.rand(3, 2, 64, 8)], 1)  # five dropped in front, two more behind
    changed[:, 7] += 1
    save(store, tensors={"kv": {"k": Rows(changed, 1, 1, range(15, 52))}})
    written, page = journal.stat().st_size - before, 3 * 64 * 8 * 4
    assert 3 * page < written < 3 * page + 3000
    assert torch.equal(store.load("one").tensors["kv"]["k"], changed)
    save(store, tensors={"kv": {"k": Rows(pages, 1, 1, range(10, 50))}})
    assert torch.equal(SessionStore(store.root).load("one").tensors["kv"]["k"], pages)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_come_back_whatever_is_added_dropped_or_changed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
        store = SessionStore(Path(folder))
        for _ in range(4):
            axis, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4))
            shape = [data.draw(st.integers(0 if i == axis else 1, 6)) for i in range(3)]
            tensor = torch.randint(0, 2, shape, dtype=torch.int16)
            count = -(-shape[axis] // step)
            numbers = sorted(data.draw(st.sets(st.integers(0, 12), min_size=count, max_size=count)))
            store.save("s", {}, {}, {"g": {"t": Rows(tensor, axis, step, numbers)}}, {})
            found = SessionStore(Path(folder)).load("s").tensors["g"]["t"]
            assert same(found, tensor)


def test_an_unchanged_group_must_be_there(store: SessionStore) -> None:
    with pytest.raises(UsageError, match="no saved group 'kv'"):
        save(store, tensors={}, unchanged=["kv"])
    assert not store.exists("one")
    folder = save(store)
    with pytest.raises(UsageError, match="no saved group 'other'"):
        save(store, unchanged=["other"])
    with pytest.raises(UsageError, match="choose one"):
        save(store, unchanged=["kv"])
    for journal in folder.iterdir():
        journal.unlink()
    with pytest.raises(SessionCorruptError, match="holds no journal"):
        save(store, tensors={}, unchanged=["kv"])


def test_an_unchanged_group_is_not_taken_from_another_process_commit(store: SessionStore) -> None:
    save(store, tag=1)
    other = SessionStore(store.root)
    other.load("one")
    save(store, tag=2)
    with pytest.raises(SaveError, match="another process has saved it"):
        save(other, tag=3, tensors={}, unchanged=["kv"])
    assert store.load("one").state == {"tag": 2}
    other.load("one")
    save(other, tag=3, tensors={}, unchanged=["kv"])
    assert torch.equal(store.load("one").tensors["kv"]["k"], torch.full((2, 3), 2))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
)
def test_tensors_that_have_no_bytes_of_their_own(store: SessionStore, tensor: Tensor) -> None:
    with pytest.raises(UsageError, match="'t' of group 'g'"):
        store.save("s", {}, {}, {"g": {"t": tensor}}, {})
    assert not store.root.exists()


def test_values_that_json_does_not_hold(store: SessionStore) -> None:
    for value in (object(), float("nan"), {1, 2}):
        with pytest.raises(UsageError, match="state"):
            store.save("s", {}, {"x": value}, {}, {})
        with pytest.raises(UsageError, match="identity"):
            store.save("s", {"x": value}, {}, {}, {})
    assert not store.root.exists()


def test_a_session_that_is_not_there(store: SessionStore) -> None:
    for use in (store.show, store.load, store.remove):
        with pytest.raises(SessionNotFoundError, match="none is saved yet"):
            use("two")
    assert store.names() == store.infos() == []
    assert not store.root.exists()
    save(store, "b")
    save(store, "a")
    for use in (store.show, store.load, store.remove):
        with pytest.raises(SessionNotFoundError, match="choose one of a, b"):
            use("two")
    assert sorted(p.name for p in store.root.iterdir() if not p.name.startswith(".")) == ["a", "b"]


def test_identity_must_match(store: SessionStore) -> None:
    save(store)
    store.load("one", IDENTITY)
    store.load("one", {"options": {"shape": (1, 2), "window": 32}})  # fewer keys, another order, a tuple
    for asked, words in {
        "model": "def",
        "options": {"window": 33, "shape": [1, 2]},
        "version": 2,
    }.items():
        with pytest.raises(SessionMismatchError) as caught:
            store.load("one", IDENTITY | {asked: words})
        message = str(caught.value)
        assert asked in message
        assert json.dumps(words) in message
        assert json.dumps(IDENTITY.get(asked)) in message or "no version" in message
        assert "longspan session rm one" in message
        assert "\n" not in message
    with pytest.raises(SessionMismatchError) as caught:
        store.load("one", {"model": "x\n" * 10_000})
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_what_is_null_is_as_good_as_none(store: SessionStore) -> None:
    save(store)
    store.load("one", IDENTITY | {"later": None})
    with pytest.raises(SessionMismatchError, match="no later, and later = 1 is asked for"):
        store.load("one", IDENTITY | {"later": 1})
    with pytest.raises(SessionMismatchError, match=r'model = ".*", and no model is asked for'):
        store.load("one", {"model": None})


def test_show_and_infos_read_no_tensors(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "b", tag=2)
    save(store, "a", tag=1)
    saved = store.load("a")
    monkeypatch.setattr(stored, "read_tensor", None)
    info = store.show("a")
    assert (info.name, info.created, info.saved, info.bytes) == ("a", saved.created, saved.saved, saved.bytes)
    assert (info.identity, info.state, info.problem, info.kept) == (IDENTITY, {"tag": 1}, None, True)
    assert store.infos() == [info, store.show("b")]
    store.catalogue.remove()
    again = SessionStore(store.root).infos()
    assert [dataclasses.replace(each, used=None) for each in again] == [
        dataclasses.replace(each, used=None) for each in (info, store.show("b"))
    ]
    assert isinstance(info, SessionInfo)
