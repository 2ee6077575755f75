"""Whatever happens to a session's files is found, named in one line, and never loaded."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.errors import SessionCorruptError, SessionMismatchError, SessionNotFoundError
from longspan.sessions import blobs, manifest
from longspan.sessions.store import SessionStore


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    store = SessionStore(tmp_path / "sessions")
    save(store)
    return store


def save(store: SessionStore, name: str = "one") -> Path:
    tensors = {"kv": {"k": torch.arange(5)}, "empty": {}}
    return store.save(name, {"model": "m"}, {"turns": [1, {"a": None}]}, tensors, {"d": "words", "é": "日本"})


def files(store: SessionStore) -> list[Path]:
    found = sorted((store.root / "one").iterdir())
    assert [p.suffix for p in found].count(".safetensors") == 2
    assert len(found) == 4
    return found


def message(store: SessionStore, use: Callable[[], object] | None = None) -> str:
    with pytest.raises(SessionCorruptError) as caught:
        (use or (lambda: store.load("one")))()
    text = str(caught.value)
    assert "\n" not in text
    assert "one" in text
    return text


def test_any_flipped_bit_is_found(store: SessionStore) -> None:
    for path in files(store):
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            text = message(store)
            assert str(path) in text
            assert "fails its checksum" in text
            assert "longspan session rm one" in text
        path.write_bytes(whole)
    store.load("one")


def test_any_cut_and_any_addition_is_found(store: SessionStore) -> None:
    for path in files(store):
        whole = path.read_bytes()
        for data in [*(whole[:at] for at in range(len(whole))), whole + b"\0", whole + b"\n", whole * 2]:
            path.write_bytes(data)
            assert str(path) in message(store)
        path.write_bytes(whole)
    store.load("one")


def test_any_deletion_is_found(store: SessionStore) -> None:
    for path in files(store):
        whole = path.read_bytes()
        path.unlink()
        text = message(store)
        assert f"{path} is missing" in text
        assert message(store, lambda: store.show("one")) == text
        assert store.infos()[0].problem == text
        assert store.exists("one")
        path.write_bytes(whole)
    store.load("one")


def test_a_folder_without_a_manifest_is_a_damaged_session(store: SessionStore) -> None:
    (store.root / "bare").mkdir()
    assert store.names() == ["bare", "one"]
    bare, one = store.infos()
    assert one.problem is None
    assert bare.problem is not None
    assert (bare.created, bare.saved, bare.bytes) == (None, None, 0)
    store.remove("bare")
    assert store.names() == ["one"]


def test_damage_is_listed_beside_what_is_whole(store: SessionStore) -> None:
    save(store, "two")
    for path in files(store):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        one, two = store.infos()
        assert str(path) in (one.problem or "")
        assert one.bytes == sum(p.stat().st_size for p in files(store))
        assert two.problem is None
        path.write_bytes(whole)


def test_a_damaged_session_can_be_removed_or_saved_again(store: SessionStore) -> None:
    for path in files(store):
        path.write_bytes(b"x")
        save(store)
        store.load("one")
        files(store)
        path.write_bytes(b"x") if path.exists() else None
        store.remove("one")
        assert list(store.root.iterdir()) == []
        save(store)


def test_a_damaged_blob_of_the_same_content_is_healed(store: SessionStore) -> None:
    for path in files(store):
        path.write_bytes(bytes(path.stat().st_size))
    save(store)
    assert store.load("one").texts == {"d": "words", "é": "日本"}


def test_a_blob_exchanged_for_another_whole_one(store: SessionStore) -> None:
    first, second = (store.root / "one").glob("*.safetensors")
    first.write_bytes(second.read_bytes())
    assert str(first) in message(store) or str(second) in message(store)


def rewrite(store: SessionStore, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and seal it again, as no accident does."""
    path = store.root / "one" / "manifest.json"
    inner = json.loads(path.read_bytes())["manifest"]
    body = change(inner) or inner
    path.write_bytes(manifest._sealed(json.dumps(body).encode()))


def test_a_later_format_is_refused_and_kept(store: SessionStore) -> None:
    rewrite(store, lambda inner: inner.update(format=manifest.FORMAT + 1, groups="as they will be"))
    assert "update longspan" in message(store)
    assert "rm one" not in message(store)
    assert "update longspan" in (store.infos()[0].problem or "")
    before = (store.root / "one" / "manifest.json").read_bytes()
    assert "update longspan" in message(store, lambda: save(store))
    assert (store.root / "one" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.pop("texts") and None,
        lambda inner: inner.update(identity=3),
        lambda inner: inner.update(created="yesterday"),
        lambda inner: inner.update(groups=[]),
        lambda inner: inner.update(format="1"),
        lambda inner: inner["texts"].update(bytes="9"),
        lambda inner: inner["texts"].update(file="../../etc/passwd"),
        lambda inner: inner["texts"].update(file="manifest.json"),
        lambda inner: [1],
        lambda inner: "text",
    ],
)
def test_a_sealed_manifest_of_another_kind(store: SessionStore, change: Callable[[dict[str, object]], object]) -> None:
    rewrite(store, change)
    assert "is not a session's manifest" in message(store)
    save(store)
    store.load("one")


def test_a_sealed_manifest_that_is_not_json(store: SessionStore) -> None:
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        (store.root / "one" / "manifest.json").write_bytes(manifest._sealed(body))
        assert "is not a session's manifest" in message(store)


def test_what_the_disk_can_not_read_is_damage(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for reader in ("read_bytes", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, reader, fail)
            assert "can't be read (Input/output error)" in message(store)


def test_what_this_safetensors_can_not_read(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # a header that no safetensors takes, under a right checksum
        patch.setattr(blobs, "_check_header", lambda path: None)
        patch.setitem(blobs._DTYPES, "int64", "I640")
        save(store)
    assert "can't be read by safetensors" in message(store)
    monkeypatch.setitem(blobs._DTYPES, "int64", "I640")
    with pytest.raises(ValueError, match="could not read them back"):
        save(store, "two")
    assert not store.exists("two")


def test_a_mismatch_is_told_before_blobs_are_read(store: SessionStore) -> None:
    for path in files(store):
        if path.name != "manifest.json":
            path.write_bytes(b"")
    with pytest.raises(SessionMismatchError):
        store.load("one", {"model": "n"})


def test_a_renamed_or_copied_folder_goes_by_its_new_name(store: SessionStore) -> None:
    shutil.copytree(store.root / "one", store.root / "two")
    (store.root / "one").rename(store.root / "three")
    assert store.names() == ["three", "two"]
    assert [store.load(name).name for name in store.names()] == ["three", "two"]
    with pytest.raises(SessionNotFoundError):
        store.load("one")
