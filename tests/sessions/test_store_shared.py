"""Any number of processes and threads may save, read, list and remove the same session."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from longspan.errors import SessionCorruptError, SessionError, SessionNotFoundError
from longspan.sessions import blobs
from longspan.sessions.locks import locked
from longspan.sessions.store import SessionStore

BUSY = "session 's' is being saved or removed by another process: look again later"


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions")


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
    assert len(names(store)) == 5


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
    store.remove("s")
    assert list(store.root.iterdir()) == []


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
    (store.root / "s" / "manifest.json").unlink()

    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("longspan.sessions.locks._acquire", refuse)
    with pytest.raises(SessionCorruptError, match="is missing"):
        store.load("s")


def test_a_commit_that_lands_while_blobs_are_read(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each step of a load another commit removes the files that it was about to read."""
    other = SessionStore(store.root)
    for step in ("check_blob", "load_file", "load_file again", "read_texts"):
        save(store, 1)
        landed = False

        def land() -> None:
            nonlocal landed
            if not landed:
                landed = True
                save(other, 2)

        with monkeypatch.context() as patch:
            if step.startswith("load_file"):
                import safetensors.torch

                real = safetensors.torch.load_file

                def load_file(path: Path, again: bool = step.endswith("again"), real=real) -> object:
                    land()
                    if again and not path.exists():  # as when torch's own opening comes too late
                        raise RuntimeError(f"unable to open file <{path}> in read-only mode")
                    return real(path)

                patch.setattr(safetensors.torch, "load_file", load_file)
            else:
                function = getattr(blobs, step)
                patch.setattr(blobs, step, lambda *args, function=function: (land(), function(*args))[1])
            assert check(store) == 2
        assert landed


def test_a_mapping_that_torch_refuses_is_no_damage(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def refuse(path: Path) -> None:
        raise RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")

    save(store, 1)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    with pytest.raises(SessionError, match="Cannot allocate memory") as caught:
        store.load("s")
    assert not isinstance(caught.value, SessionCorruptError)
