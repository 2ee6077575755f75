"""A save that is cut off anywhere leaves the whole old commit or the whole new one, and then room for the next."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longspan.errors import SaveError, SessionCorruptError, SessionNotFoundError
from longspan.sessions import committing, records, upkeep
from longspan.sessions.store import SessionStore

CALLS = ("write", "fsync", "replace", "open", "mkdir")  # what a save asks of the disk
UNDO = ("unlink", "rmdir", "ftruncate")  # what it asks when it cleans up


class Crash(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


def save(store: SessionStore, tag: int, **kwargs: object) -> None:
    tensors = {"kv": {"k": torch.full((40,), tag)}, f"group{tag}": {"x": torch.full((tag,), tag)}, "empty": {}}
    store.save("s", {"m": 1}, {"tag": tag}, **({"tensors": tensors, "texts": {"d": f"text {tag} " * 20}} | kwargs))


def check(store: SessionStore) -> int:
    """Return the tag of the commit that is there, after making sure that it is whole and of one piece."""
    saved = store.load("s")
    tag = saved.state["tag"]
    assert isinstance(tag, int)
    assert torch.equal(saved.tensors["kv"]["k"], torch.full((40,), tag))
    assert torch.equal(saved.tensors[f"group{tag}"]["x"], torch.full((tag,), tag))
    assert saved.texts == {"d": f"text {tag} " * 20}
    return tag


def files(store: SessionStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store.root / "s").iterdir()}


def gone(store: SessionStore) -> None:
    store.catalogue.close()
    shutil.rmtree(store.root, ignore_errors=True)


@pytest.fixture(params=[10**9, 0], ids=["appended", "written anew"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit goes behind the others, or replaces them."""
    monkeypatch.setattr(committing, "COMPACTED", request.param)
    if request.param == 0:
        monkeypatch.setattr(committing, "max", lambda *args: -1, raising=False)  # whatever is needed still


@contextlib.contextmanager
def failing(k: int, error: BaseException, only: str | None = None) -> Iterator[list[str]]:
    """Fail the k-th call (from 0) of the disk; a failing write has written half. After a Crash, all calls fail."""
    calls: list[str] = []
    real = {name: getattr(os, name) for name in (*CALLS, *UNDO)}
    dead = False

    def wrap(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal dead
            if dead:
                raise Crash
            if (
                name in CALLS
                and only in (None, name)
                and not (name == "open" and (args[1] == os.O_RDONLY or str(args[0]).endswith(".sqlite")))
            ):
                calls.append(name)
                if len(calls) == k + 1:
                    dead = isinstance(error, Crash)
                    if name == "write":
                        real["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                    raise error
                if name == "write":
                    args = (args[0], args[1][:300])  # a disk may take less than it is given
            return real[name](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in real:
            patch.setattr(os, name, wrap(name))
        yield calls


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_at_any_call(store: SessionStore, overwrite: bool, way: None) -> None:
    for k in range(200):
        gone(store)
        if overwrite:
            save(store, 1)
        before = files(store) if overwrite else {}
        with failing(k, full()) as calls:
            try:
                save(store, 2)
                break
            except SaveError as error:
                text = str(error)
        assert "\n" not in text
        assert str(store.root / "s") in text and "untouched" in text
        if overwrite:
            assert files(store) == before
            assert check(store) == 1
        else:
            assert not store.exists("s")
        save(store, 3)
        assert check(store) == 3
        assert upkeep.verify(store) == []
    assert k == len(calls) > 8
    assert check(store) == 2


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_or_an_interrupt_at_any_call(
    store: SessionStore, overwrite: bool, error: type[BaseException], way: None
) -> None:
    for k in range(200):
        gone(store)
        if overwrite:
            save(store, 1)
        with failing(k, error()) as calls:
            try:
                save(store, 2)
                break
            except error:
                pass
        if overwrite:
            assert check(store) in (1, 2)
        elif store.exists("s"):
            try:
                assert check(store) == 2
            except SessionCorruptError as damaged:
                assert error is Crash  # which leaves what it began, and says so
                assert "holds no journal" in str(damaged)
        else:
            with pytest.raises(SessionNotFoundError):
                store.load("s")
        if error is KeyboardInterrupt and store.exists("s"):
            assert not any(name.endswith(".part") for name in files(store))
        before = check(store) if overwrite else None
        upkeep.collect(store)
        assert all(problem.harmless is False for problem in upkeep.verify(store)) and upkeep.verify(store) == []
        assert before is None or check(store) == before, "gc takes nothing that was committed"
        save(store, 3)
        assert check(store) == 3
    assert k == len(calls) > 8
    assert check(store) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_disk_holds_whole_outlives_an_interrupt(store: SessionStore, overwrite: bool, way: None) -> None:
    """Nobody may see a commit that Ctrl-C then takes back; and later saves go on from it."""
    seen: list[int] = []
    real = os.lseek

    def interrupted(*args: int) -> int:
        if args[2] == os.SEEK_CUR and not seen:  # which follows the commit's fsync
            seen.append(args[0])
            raise KeyboardInterrupt
        return real(*args)

    if overwrite:
        save(store, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "lseek", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    assert len(seen) == 1
    assert check(store) == 2
    store.save(
        "s", {"m": 1}, {"tag": 2}, {"group2": {"x": torch.full((2,), 2)}, "empty": {}}, {"d": "text 2 " * 20}, ["kv"]
    )
    assert check(store) == 2
    assert upkeep.verify(store) == []


def test_a_fork_a_removal_and_a_rewriting_cut_off_at_any_call(store: SessionStore) -> None:
    works = {
        "fork": lambda: store.fork("s", "t"),
        "remove": lambda: store.remove("s"),
        "restore": lambda: store.restore("s", 1),
    }
    for name, work in works.items():
        for k in range(100):
            gone(store)
            save(store, 1)
            save(store, 2)
            with failing(k, Crash()) as calls:
                try:
                    work()
                    break
                except Crash:
                    pass
            if name == "remove":
                assert not store.exists("s") or check(store) == 2
            else:
                assert check(store) in ((2,) if name == "fork" else (1, 2))
            assert set(store.names()) <= {"s", "t"}
            if store.exists("t"):
                assert store.load("t").state == {"tag": 2}
            upkeep.collect(store)
            assert upkeep.verify(store) == []
            left = {path.name for path in store.root.iterdir() if not path.name.startswith(".catalogue")}
            assert left <= {"s", "t", ".s.lock", ".t.lock"}
            save(store, 3)
            assert check(store) == 3
        assert k == len(calls) > (0 if name == "remove" else 5)


def test_rows_are_synced_before_their_commit_and_a_new_name_after_it(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "write", "replace")}

    def name_of(handle: int) -> str:
        return Path(f"/proc/self/fd/{handle}").resolve().name

    def fsync(handle: int) -> None:
        log.append(("fsync", name_of(handle)))
        real["fsync"](handle)

    def write(handle: int, data: bytes) -> int:
        commit = bytes(data[:4]) == records.MAGIC and int.from_bytes(data[4:6], "little") == records.COMMIT
        log.append(("commit" if commit else "write", name_of(handle)))
        return int(real["write"](handle, data))

    def replace(source: Path, target: Path) -> None:
        log.append(("replace", Path(target).name))
        real["replace"](source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "replace", replace)
    save(store, 1)
    calls = [call for call, _ in log]
    assert calls[-5:] == ["fsync", "commit", "fsync", "replace", "fsync"] and log[-1][1] == "s"
    assert [name for call, name in log if call == "fsync"][:2] == [store.root.parent.parent.name, "deep"]
    log.clear()
    save(store, 2)
    calls = [call for call, _ in log]
    assert calls[-3:] == ["fsync", "commit", "fsync"] and "write" in calls and "commit" not in calls[:-3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_at_every_page(small_disk: Path) -> None:
    store = SessionStore(small_disk / "sessions")
    save(store, 1, texts={"d": "text 1 " * 20, "more": "1" * 20_000})
    outcomes = []
    for free in range(12):  # pages of 4 KiB, of which a save takes six
        before, filler = files(store), small_disk / "filler"
        left = shutil.disk_usage(small_disk).free // 4096 - free
        filler.write_bytes(bytes(4096 * left))
        try:
            save(store, 2, texts={"d": "text 2 " * 20, "more": "2" * 20_000})
            outcomes.append(True)
            assert store.load("s").state["tag"] == 2
        except SaveError as error:
            outcomes.append(False)
            assert "No space left" in str(error)
            assert "free some space" in str(error)
            assert "is free" in str(error)
            assert store.load("s").state["tag"] == 1
            assert files(store) == before
        filler.unlink()
        save(store, 1, texts={"d": "text 1 " * 20, "more": "1" * 20_000})
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes)
    huge = {"huge": {"x": torch.zeros(2**20)}}
    with pytest.raises(SaveError, match=r"needs up to 4\.0 MiB, .* is free there"):
        save(store, 2, tensors=huge)
    with pytest.raises(SaveError):
        store.save("t", {}, {}, huge, {})
    assert store.names() == ["s"]
    assert store.load("s").state["tag"] == 1


def test_a_folder_that_can_not_be_synced_is_no_failure(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(store, 1)
    assert check(store) == 1
