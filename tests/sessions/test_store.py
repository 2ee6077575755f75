"""Sessions come back as they were saved, under their own names, to those who ask with the same identity."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import _TYPES
from torch import Tensor

from longspan.errors import (
    SaveError,
    SessionCorruptError,
    SessionMismatchError,
    SessionNotFoundError,
    UsageError,
)
from longspan.sessions import blobs
from longspan.sessions.store import SessionInfo, SessionStore

IDENTITY = {"model": "abc", "options": {"window": 32, "shape": [1, 2]}, "attention": "dense"}
DTYPES = [getattr(torch, name) for name in blobs._DTYPES]


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "deep" / "sessions")


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
    if dtype == torch.float4_e2m1fn_x2 and not shape:
        shape = [2]  # safetensors counts the halves along the last dimension, so there must be one
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
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(Path(folder))
        store.save("s", {}, {}, groups, texts)
        saved = SessionStore(Path(folder)).load("s")
        assert saved.texts == texts
        assert {group: set(held) for group, held in saved.tensors.items()} == {g: set(h) for g, h in groups.items()}
        for group, held in groups.items():
            for name, tensor in held.items():
                assert same(saved.tensors[group][name], tensor), (group, name, tensor)


def test_every_type_of_safetensors_is_known() -> None:
    held = {torch.empty((), dtype=dtype).dtype for dtype in DTYPES}
    assert {dtype for dtype in _TYPES.values() if dtype is not None} <= held


def test_identity_state_times_and_size(store: SessionStore) -> None:
    before = datetime.now(UTC)
    folder = save(store)
    saved = store.load("one")
    assert (saved.name, saved.identity, saved.state) == ("one", IDENTITY, {"tag": 1})
    assert before <= saved.created == saved.saved <= datetime.now(UTC)
    assert saved.bytes == sum(p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json")
    assert isinstance(json.loads((folder / "manifest.json").read_bytes()), dict)
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
    monkeypatch.setattr(blobs, "PIECE", 7)
    tensor = torch.arange(1000, dtype=torch.int32)
    store.save("s", {}, {}, {"g": {"t": tensor}}, {"d": "word " * 100})
    saved = store.load("s")
    assert torch.equal(saved.tensors["g"]["t"], tensor)
    assert saved.texts["d"] == "word " * 100


def test_overwriting_replaces_everything_and_leaves_no_old_file(store: SessionStore) -> None:
    folder = save(store, tag=1)
    old = {p.name for p in folder.iterdir()}
    loaded = store.load("one")
    store.save("one", {"other": 1}, {}, {"new": {"x": torch.zeros(2)}}, {})
    new = {p.name for p in folder.iterdir()}
    assert old & new == {"manifest.json"}
    assert len(new) == 3
    saved = store.load("one")
    assert (saved.identity, saved.state, set(saved.tensors), saved.texts) == ({"other": 1}, {}, {"new"}, {})
    assert torch.equal(loaded.tensors["kv"]["k"], torch.full((2, 3), 1))  # mapped from a file that is gone


def test_what_is_loaded_may_be_changed_and_saved_again(store: SessionStore) -> None:
    save(store)
    saved = store.load("one")
    store.save("one", IDENTITY, {}, saved.tensors, saved.texts)  # onto the files that it is mapped from
    saved.tensors["kv"]["k"].add_(1)
    assert torch.equal(store.load("one").tensors["kv"]["k"], torch.full((2, 3), 1))
    store.save("one", IDENTITY, {}, saved.tensors, saved.texts)
    assert torch.equal(store.load("one").tensors["kv"]["k"], torch.full((2, 3), 2))


def test_an_unchanged_group_is_kept_and_not_written(store: SessionStore) -> None:
    folder = save(store, tag=1)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    for other in (store, SessionStore(store.root)):  # with and without having seen the session
        save(other, tag=2, tensors={"ids": {"t": torch.tensor(2)}}, unchanged=["kv"])
        saved = other.load("one")
        assert torch.equal(saved.tensors["kv"]["k"], torch.full((2, 3), 1))
        assert saved.tensors["ids"]["t"] == 2
        assert saved.state == {"tag": 2}
        after = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        assert len(after) == 4
        kept = (before.keys() & after.keys()) - {"manifest.json"}
        assert [before[name] == after[name] for name in kept] == [True]


def test_an_unchanged_group_must_be_there(store: SessionStore) -> None:
    with pytest.raises(UsageError, match="no saved group 'kv'"):
        save(store, tensors={}, unchanged=["kv"])
    assert not store.exists("one")
    assert list(store.root.iterdir()) == []
    folder = save(store)
    with pytest.raises(UsageError, match="no saved group 'other'"):
        save(store, unchanged=["other"])
    with pytest.raises(UsageError, match="choose one"):
        save(store, unchanged=["kv"])
    for blob in folder.glob("*.safetensors"):
        blob.unlink()
    with pytest.raises(SessionCorruptError, match="is missing"):
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
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
)
def test_tensors_that_safetensors_does_not_hold(store: SessionStore, tensor: Tensor) -> None:
    with pytest.raises(UsageError, match="'t' of group 'g'"):
        store.save("s", {}, {}, {"g": {"t": tensor}}, {})
    assert not store.root.exists()


def test_values_that_json_does_not_hold(store: SessionStore) -> None:
    for value in (object(), float("nan"), {1, 2}):
        with pytest.raises(UsageError, match="state"):
            store.save("s", {}, {"x": value}, {}, {})
        with pytest.raises(UsageError, match="identity"):
            store.save("s", {"x": value}, {}, {}, {})
    with pytest.raises(UsageError, match="__metadata__"):
        store.save("s", {}, {}, {"g": {"__metadata__": torch.zeros(1)}}, {})
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


def test_show_and_infos_read_manifests_only(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, "b", tag=2)
    save(store, "a", tag=1)
    saved = store.load("a")
    monkeypatch.setattr(blobs, "check_blob", None)
    info = store.show("a")
    assert info == SessionInfo("a", saved.created, saved.saved, saved.bytes, IDENTITY, {"tag": 1}, None)
    assert store.infos() == [info, store.show("b")]
