"""Any number of processes and threads may save, read, list and remove the same session."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.errors import SessionCorruptError, SessionNotFoundError, UsageError
from longspan.sessions import committing, files, upkeep
from longspan.sessions.locks import locked
from longspan.sessions.store import SessionStore

BUSY = "session 's' is being saved or removed by another process: look again later"


def save(store: SessionStore, tag: int) -> None:
    tensors = {"kv": {"k": torch.full((40,), tag)}, f"group{tag}": {"x": torch.full((tag,), tag)}, "empty": {}}
    store.save("s", {"m": 1}, {"tag": tag}, tensors, {"d": f"text {tag}"})


def check(store: SessionStore) -> int:
    """Return the tag of the commit that is there, after making sure that it is whole and of one piece."""
    saved = store.load("s")
    tag = saved.state["tag"]
    assert isinstance(tag, int)
    assert torch.equal(saved.tensors["kv"]["k"], torch.full((40,), tag))
    assert torch.equal(saved.tensors[f"group{tag}"]["x"], torch.full((tag,), tag))
    assert saved.texts == {"d": f"text {tag}"}
    return tag


def names(store: SessionStore) -> set[str]:
    return {p.name for p in (store.root / "s").iterdir()}


WRITER = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from test_store_shared import SessionStore, save
store = SessionStore(pathlib.Path(sys.argv[2]))
for tag in range(int(sys.argv[3]), int(sys.argv[3]) + 12):
    save(store, tag)
"""


def test_several_processes_save_while_others_read(store: SessionStore) -> None:
    save(store, 1)
    arguments = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(store.root)]
    writers = [subprocess.Popen([*arguments, str(start)]) for start in (100, 200)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(check(store))
        assert store.infos()[0].problem in (
            None,
            "session 's' is being saved or removed by another process: look again later",
        )
    assert [writer.returncode for writer in writers] == [0, 0]
    assert check(store) in (111, 211)
    assert seen <= {1, *range(100, 112), *range(200, 212)}
    assert len(names(store)) == 1 and upkeep.verify(store) == []


def test_threads_save_read_and_remove_at_once(store: SessionStore) -> None:
    failures: list[BaseException] = []

    def work(start: int) -> None:
        mine = SessionStore(store.root)
        try:
            for tag in range(start, start + 12):
                save(mine, tag)
                with contextlib.suppress(SessionNotFoundError):
                    check(mine)
                if tag % 4 == 0:
                    with contextlib.suppress(SessionNotFoundError):
                        mine.remove("s")
                mine.infos()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in (10, 40, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    save(store, 5)
    assert check(store) == 5
    assert upkeep.verify(store) == []
    store.remove("s")
    assert {path.name for path in store.root.iterdir() if not path.name.startswith(".catalogue")} == set()


def test_a_first_save_in_progress_is_waited_for_but_not_by_a_listing(store: SessionStore) -> None:
    folder = store.root / "s"
    folder.mkdir(parents=True)
    done = threading.Event()
    with locked(store.root / ".s.lock", folder):
        reader = threading.Thread(target=lambda: (check(store), done.set()))
        reader.start()
        assert "is being saved" in (store.infos()[0].problem or "")
        assert not done.wait(0.2)
        other = SessionStore(store.root.parent / "other")
        save(other, 1)
        for path in (other.root / "s").iterdir():
            path.rename(folder / path.name)
    reader.join(30)
    assert done.is_set()


def test_a_reader_on_a_disk_that_takes_no_lock(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)
    (store.root / ".s.lock").unlink()
    for path in (store.root / "s").iterdir():
        path.unlink()

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("longspan.sessions.locks._acquire", refuse)
    with pytest.raises(SessionCorruptError, match="holds no journal"):
        store.load("s")


def test_a_commit_that_replaces_what_is_being_read(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that has opened the files reads on; one that comes too late for one of them begins again."""
    monkeypatch.setattr(committing, "max", lambda *args: -1, raising=False)  # every commit replaces the files
    other = SessionStore(store.root)
    save(store, 1)
    opened = store.load("s", lazily=True)
    save(other, 2)
    assert torch.equal(opened.tensors["kv"]["k"], torch.full((40,), 1))
    for step in ("open_to_read", "read_at", "read_into"):
        save(store, 1)
        landed, real = False, getattr(files, step)

        def late(*args: object, real: Callable[..., object] = real) -> object:
            nonlocal landed
            if not landed:
                landed = True
                save(other, 2)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(files, step, late)
            assert check(store) in (1, 2)
        assert landed
    assert check(store) == 2


def test_forks_share_their_files_and_go_in_any_order(store: SessionStore) -> None:
    big = torch.arange(100_000)
    store.save("a", {"m": 1}, {"tag": 1}, {"kv": {"k": big}}, {"d": "text"}, tokens=range(200))
    store.fork("a", "b")
    store.fork("b", "c")
    assert upkeep.used(store) < 1.1 * big.nbytes, "nothing was copied"
    store.save("a", {"m": 1}, {"tag": 2}, {"kv": {"k": big + 1}}, {})
    store.save("b", {"m": 1}, {"tag": 3}, {"own": {"x": torch.ones(3)}}, {}, unchanged=["kv"])
    assert [store.load(name).state["tag"] for name in "abc"] == [2, 3, 1]
    assert [int(store.load(name).tensors["kv"]["k"][5]) for name in "abc"] == [6, 5, 5]
    assert {prefix.name for prefix in store.longest_prefix(list(range(200)), {"m": 1})} == {"b", "c"}
    with pytest.raises(UsageError, match="already"):
        store.fork("a", "b")
    for gone, left in (("a", "bc"), ("c", "b")):
        store.remove(gone)
        upkeep.collect(store)
        assert upkeep.verify(store) == []
        assert all(torch.equal(store.load(name).tensors["kv"]["k"], big) for name in left)
    assert upkeep.used(store) < 3.3 * big.nbytes
    store.remove("b")
    assert upkeep.used(store) == 0


def test_a_fork_where_files_have_one_name_only(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    save(store, 1)
    monkeypatch.setattr(os, "link", refuse)
    store.fork("s", "t")
    store.remove("s")
    assert store.load("t").state == {"tag": 1} and upkeep.verify(store) == []
