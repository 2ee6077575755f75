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
from longspan.sessions.store import SessionStore

CALLS = ("write", "fsync", "replace", "open", "mkdir")  # what a save asks of the disk
UNDO = ("unlink", "rmdir")  # what it asks when it cleans up


class Crash(BaseException):
    """The process is gone: nothing that it would have done afterwards happens."""


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions")


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


def names(store: SessionStore) -> set[str]:
    return {p.name for p in (store.root / "s").iterdir()}


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
            if name in CALLS and only in (None, name) and not (name == "open" and args[1] == os.O_RDONLY):
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


@pytest.mark.parametrize("only", [None, *CALLS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_error_at_any_call(store: SessionStore, overwrite: bool, only: str | None) -> None:
    for k in range(200):
        shutil.rmtree(store.root, ignore_errors=True)
        if overwrite:
            save(store, 1)
        before = names(store) if overwrite else set()
        with failing(k, full(), only) as calls:
            try:
                save(store, 2)
                break
            except SaveError as error:
                text = str(error)
        assert "\n" not in text
        assert str(store.root / "s") in text
        if "did not confirm" in text:  # the folder's own sync, after the manifest was replaced
            assert calls[-1] == "fsync"
            assert check(store) == 2
            assert not any(name.endswith(".part") for name in names(store))
        elif overwrite:
            assert check(store) == 1
            assert names(store) == before
            assert "untouched" in text
        else:
            assert not store.exists("s")
            assert not store.root.exists() or list(store.root.iterdir()) == []
        save(store, 3)
        assert check(store) == 3
        assert len(names(store)) == 5
    assert k == len(calls)
    assert check(store) == 2
    assert k > 1 or (only == "mkdir" and overwrite)


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_or_an_interrupt_at_any_call(store: SessionStore, overwrite: bool, error: type[BaseException]) -> None:
    for k in range(200):
        shutil.rmtree(store.root, ignore_errors=True)
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
                assert "manifest.json is missing" in str(damaged)
        else:
            with pytest.raises(SessionNotFoundError):
                store.load("s")
        if error is KeyboardInterrupt and store.exists("s"):
            assert not any(name.endswith(".part") for name in names(store))
        save(store, 3)
        assert check(store) == 3
        assert len(names(store)) == 5
    assert k == len(calls) > 20
    assert check(store) == 2


def test_an_unchanged_group_survives_an_error_at_any_call(store: SessionStore) -> None:
    save(store, 1)
    for k in range(200):
        before = names(store)
        with failing(k, full()) as calls:
            try:
                save(
                    store,
                    1,
                    tensors={"group1": {"x": torch.full((1,), 1)}, "more": {"y": torch.ones(k + 1)}},
                    unchanged=["kv"],
                )
                break
            except SaveError as error:
                assert names(store) == before or "did not confirm" in str(error)
        assert check(store) == 1
    assert k == len(calls)
    assert check(store) == 1
    assert store.load("s").tensors["more"]["y"].numel() == k + 1


def test_everything_is_synced_before_something_relies_on_it(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    log: list[tuple[str, str]] = []
    real_fsync, real_replace, real_unlink = os.fsync, os.replace, os.unlink

    def fsync(handle: int) -> None:
        log.append(("fsync", Path(f"/proc/self/fd/{handle}").resolve().name))
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        assert ("fsync", Path(source).name) in log
        log.append(("replace", Path(target).name))
        real_replace(source, target)

    def unlink(path: Path, **kwargs: object) -> None:
        log.append(("unlink", Path(path).name))
        real_unlink(path, **kwargs)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name open files")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    save(store, 2)
    manifest = log.index(("replace", "manifest.json"))
    last_blob = max(at for at, (call, name) in enumerate(log) if call == "replace" and name != "manifest.json")
    first_unlink = min(at for at, (call, _) in enumerate(log) if call == "unlink")
    assert ("fsync", "s") in log[last_blob:manifest]  # the folder, with the blobs' names
    assert ("fsync", "s") in log[manifest:first_unlink]
    log.clear()
    store.remove("s")
    shutil.rmtree(store.root)
    save(store, 3)
    assert [name for call, name in log if call == "fsync"][:2] == [store.root.parent.name, "sessions"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_at_every_page(small_disk: Path) -> None:
    store = SessionStore(small_disk / "sessions")
    save(store, 1)
    before = names(store)
    outcomes = []
    for free in range(12):  # pages of 4 KiB; a small save takes about one for each file, beside the old commit's
        filler = small_disk / "filler"
        left = shutil.disk_usage(small_disk).free // 4096 - free
        filler.write_bytes(bytes(4096 * left))
        try:
            save(store, 2)
            outcomes.append(True)
            assert check(store) == 2
        except SaveError as error:
            outcomes.append(False)
            assert "No space left" in str(error)
            assert "free some space" in str(error)
            assert f"{4 * free}.0 KiB is free" in str(error) or (not free and "0 bytes is free" in str(error))
            assert check(store) == 1
            assert names(store) == before
        filler.unlink()
        save(store, 1)
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes)
    huge = {"huge": {"x": torch.zeros(2**20)}}
    with pytest.raises(SaveError, match=r"needs 4\.0 MiB, .* KiB is free there"):
        save(store, 2, tensors=huge)
    with pytest.raises(SaveError):
        store.save("t", {}, {}, huge, {})
    assert store.names() == ["s"]
    assert check(store) == 1


def test_a_folder_that_can_not_be_synced_is_no_failure(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(store, 1)
    assert check(store) == 1
