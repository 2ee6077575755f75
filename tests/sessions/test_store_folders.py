"""Sessions are private folders under names that lead nowhere else."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan.errors import SaveError, SessionCorruptError, SessionError, UsageError
from longspan.sessions import files, upkeep
from longspan.sessions.store import SessionStore


def save(store: SessionStore, name: str = "one", tag: int = 1) -> Path:
    return store.save(name, {}, {}, {"a": {"x": torch.tensor(tag)}, "b": {"x": torch.ones(tag)}}, {"tag": f"{tag}"})


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "a/b", "../a", "/a", "a\\b", "a b", "a\n", "é", "a" * 101, "a\0"]
)
def test_bad_names(store: SessionStore, name: str) -> None:
    for use in (store.exists, store.show, store.load, store.remove, lambda name: save(store, name)):
        with pytest.raises(UsageError, match="can't name a session"):
            use(name)
    assert not store.root.exists()


@pytest.mark.parametrize("name", ["a", "A.b", "-", "_", "0", "a..b", "x" * 100])
def test_good_names(store: SessionStore, name: str) -> None:
    save(store, name)
    assert store.exists(name)
    assert store.names() == [name]
    store.remove(name)
    assert not store.exists(name)
    assert store.names() == []


def test_listing_imports_no_torch(store: SessionStore) -> None:
    save(store)
    code = (
        "import sys; from pathlib import Path; from longspan.sessions.store import SessionStore\n"
        f"print(SessionStore(Path({str(store.root)!r})).infos()[0].name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["one", "False"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no mode bits")
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_sessions_are_private(store: SessionStore, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = save(store)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.root.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in [*folder.iterdir(), *(path for path in store.root.iterdir() if path.is_file())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("reader", ["open_to_read", "read_into"])
def test_unreadable_is_not_damaged(store: SessionStore, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    save(store)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, reader, refuse)
    with pytest.raises(SessionError, match=r"Permission denied.*readable to you") as caught:
        store.load("one")
    assert not isinstance(caught.value, SessionCorruptError)


def test_the_root_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SessionStore(tmp_path / "file")
    with pytest.raises(SaveError, match="can't save session 'one'"):
        save(store)
    with pytest.raises(SessionError, match="can't list"):
        store.names()


def test_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_SESSIONS", str(tmp_path / "named"))
    assert save(SessionStore()) == tmp_path / "named" / "one"


def test_files_of_others_are_left_alone(store: SessionStore) -> None:
    folder = save(store)
    for name in ("notes.txt", "mine.part", "other.json", "model.safetensors"):
        (folder / name).write_text("mine")
    save(store, tag=2)
    upkeep.collect(store)
    assert {p.name for p in folder.iterdir() if not re.fullmatch(r"\d{6}-[0-9a-f]{16}.journal", p.name)} == {
        "notes.txt",
        "mine.part",
        "other.json",
        "model.safetensors",
    }


def test_whether_it_can_be_saved_is_known_before(store: SessionStore) -> None:
    store.check_writable("one")
    assert list(store.root.iterdir()) == []
    folder = save(store)
    before = sorted(folder.iterdir())
    store.check_writable("one")
    assert sorted(folder.iterdir()) == before
    with pytest.raises(UsageError, match="can't name"):
        store.check_writable("a/b")
    (store.root.parent / "file").write_text("mine")
    for root in (store.root.parent / "file", store.root.parent / "file" / "below"):
        with pytest.raises(SaveError, match=r"can't save session 'one' in .*LONGSPAN_SESSIONS"):
            SessionStore(root).check_writable("one")
