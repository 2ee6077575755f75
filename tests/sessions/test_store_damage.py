"""Whatever happens to a session's files is found, named with its place, and never loaded as something else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.errors import SessionCorruptError, SessionError, SessionMismatchError, SessionNotFoundError, UsageError
from longspan.sessions import archive, files, locks, records, upkeep
from longspan.sessions.appending import Appender
from longspan.sessions.journal import Journal
from longspan.sessions.store import Rows, SessionStore

TEXTS = {"d": "words", "é": "日本"}


@pytest.fixture
def store(store: SessionStore) -> SessionStore:
    save(store)
    return store


def save(store: SessionStore, name: str = "one", tag: int = 0) -> Path:
    tensors = {"kv": {"k": torch.arange(5), "r": Rows(torch.arange(9.0) + tag)}, "empty": {}}
    state = {"turns": [1, {"a": None}], "tag": tag}
    return store.save(name, {"model": "m"}, state, tensors, TEXTS, tokens=range(tag, tag + 130))


def journal(store: SessionStore, name: str = "one") -> Path:
    (path,) = (store.root / name).iterdir()
    return path


def message(store: SessionStore, use: Callable[[], object] | None = None) -> str:
    with pytest.raises(SessionCorruptError) as caught:
        (use or (lambda: store.load("one")))()
    text = str(caught.value)
    assert "\n" not in text
    assert "one" in text
    return text


def test_any_flipped_bit_is_found_and_named(store: SessionStore) -> None:
    save(store, tag=1)
    path = journal(store)
    whole = path.read_bytes()
    loaded = store.load("one")
    handle = path.open("r+b", buffering=0)
    for at in range(0, len(whole), 3):
        os.pwrite(handle.fileno(), bytes([whole[at] ^ (1 << at % 8)]), at)
        (problem, *_) = upkeep.verify(store, "one")
        assert problem.file == str(path) and problem.byte is not None and problem.byte <= at, problem
        assert at - problem.byte < 2000 and "\n" not in problem.line()
        try:
            found = store.load("one")
        except SessionCorruptError as error:
            assert str(path) in str(error) and "longspan session restore one" in str(error)
        else:  # in rows that the last commit does not need, or in zeros
            assert (found.state, found.texts) == (loaded.state, TEXTS)
            assert all(torch.equal(found.tensors["kv"][name], loaded.tensors["kv"][name]) for name in ("k", "r"))
        os.pwrite(handle.fileno(), whole[at : at + 1], at)
    handle.close()
    assert upkeep.verify(store) == []


def test_any_cut_leaves_a_commit_or_is_told(store: SessionStore) -> None:
    """Where the catalogue is lost, a cut is what an interrupted save leaves; where it is there, it is damage."""
    path = journal(store)
    first = path.stat().st_size
    save(store, tag=1)
    whole = path.read_bytes()
    for at in [*range(0, len(whole), 101), first, first - 1, len(whole) - 1]:
        path.write_bytes(whole[:at])
        assert str(path) in message(store)
        store.catalogue.remove()
        if at >= first:
            assert store.load("one").state["tag"] == 0
        else:
            assert str(path) in message(store)
        path.write_bytes(whole)
        store.show("one")
    for more in (b"\0", b"\n", whole):
        path.write_bytes(whole + more)
        assert store.load("one").state["tag"] == 1, "what lies behind the last commit is an interrupted save's"
    path.write_bytes(whole)
    store.load("one")


def test_damage_can_be_gone_back_behind(store: SessionStore) -> None:
    path = journal(store)
    first = path.stat().st_size
    save(store, tag=1)
    save(store, tag=2)
    assert [number for number, _ in store.commits("one")] == [1, 2, 3]
    data = bytearray(path.read_bytes())
    data[first + 64] ^= 1  # of the second commit's rows, on which the third rests too
    path.write_bytes(data)
    message(store)
    assert store.restore("one") == 1
    assert store.load("one").state["tag"] == 0 and upkeep.verify(store) == []
    save(store, tag=3)
    assert store.load("one").state["tag"] == 3


def test_an_earlier_commit_is_gone_back_to(store: SessionStore) -> None:
    for tag in (1, 2):
        save(store, tag=tag)
    assert store.restore("one", 2) == 2
    assert store.load("one").state["tag"] == 1
    assert torch.equal(store.load("one").tensors["kv"]["r"], torch.arange(9.0) + 1)
    with pytest.raises(ValueError, match="no commit 9: choose one of"):
        store.restore("one", 9)


def test_a_missing_journal(store: SessionStore) -> None:
    journal(store).unlink()
    text = message(store)
    assert "holds no journal" in text
    assert message(store, lambda: store.show("one")) == text
    assert store.infos()[0].problem == text
    assert store.exists("one")


def test_a_folder_without_a_journal_is_a_damaged_session(store: SessionStore) -> None:
    (store.root / "bare").mkdir()
    assert store.names() == ["bare", "one"]
    bare, one = store.infos()
    assert one.problem is None
    assert bare.problem is not None
    assert (bare.created, bare.saved, bare.bytes) == (None, None, 0)
    store.remove("bare")
    assert store.names() == ["one"]


def test_a_damaged_session_is_listed_and_can_be_removed_or_saved_again(store: SessionStore) -> None:
    save(store, "two")
    path = journal(store)
    path.write_bytes(b"x")
    one, two = store.infos()
    assert str(path) in (one.problem or "") and one.bytes == 1
    assert two.problem is None
    save(store, tag=5)
    assert store.load("one").state["tag"] == 5 and not path.exists()
    journal(store).write_bytes(b"x")
    store.remove("one")
    assert store.names() == ["two"]


def test_a_segment_of_another_session_is_not_taken(store: SessionStore) -> None:
    save(store, "two")
    journal(store).write_bytes(journal(store, "two").read_bytes())
    assert "bears another segment's name" in message(store)


def rewrite(store: SessionStore, change: Callable[[dict[str, object]], object]) -> None:
    """Change the last commit and seal it again, as no accident does."""
    journal_, _, path = store.opened("one", store.root / "one")
    commit = journal_.commit()
    record = journal_.commits[-1][1]
    body = change(commit.told) or commit.told
    meta = body if isinstance(body, bytes) else json.dumps(body).encode()
    data = path.read_bytes()[: record.at]
    path.write_bytes(data + records.encode(records.COMMIT, record.commit, meta, 0, journal_.last.salt))
    store.catalogue.remove()


@pytest.mark.parametrize("deep", [False, True])
def test_a_later_format_is_refused_and_kept(store: SessionStore, deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if deep:  # the records' own
        with monkeypatch.context() as patch:
            patch.setattr(records, "FORMAT", records.FORMAT + 1)
            store.remove("one")
            save(store)
    else:
        rewrite(store, lambda told: told.update(format=3, tensors="as they will be"))
    store.catalogue.remove()
    before = journal(store).read_bytes()
    for use in (None, lambda: store.show("one"), lambda: save(store), lambda: store.fork("one", "two")):
        text = message(store, use)
        assert "update longspan" in text and "rm one" not in text
    assert "update longspan" in (store.infos()[0].problem or "")
    assert journal(store).read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.pop("texts") and None,
        lambda told: told.update(identity=3),
        lambda told: told.update(created="yesterday"),
        lambda told: told.update(tensors=[]),
        lambda told: told.update(format="x"),
        lambda told: told["tensors"]["kv"]["k"].update(shape=[6]),
        lambda told: told["tensors"]["kv"]["k"].update(dtype="float33"),
        lambda told: told["tensors"]["kv"]["r"].update(rows="0-9"),
        lambda told: told["texts"].append("more"),
        lambda told: b"[1]",
        lambda told: b"\xff",
        lambda told: b"[" * 100_000,
    ],
)
def test_a_sealed_commit_of_another_kind(store: SessionStore, change: Callable[[dict[str, object]], object]) -> None:
    rewrite(store, change)
    assert str(store.root / "one") in message(store)
    save(store)
    store.load("one")


def test_a_segment_that_follows_a_path_leads_nowhere(store: SessionStore) -> None:
    journal(store).unlink()
    head = records.encode_head(7, [("../two/000000-0000000000000000.journal", 64)])
    (store.root / "one" / f"000000-{7:016x}.journal").write_bytes(head)
    assert "is no segment's name" in message(store)


def test_what_the_disk_can_not_read_is_no_damage(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    for reader in ("read_at", "read_into", "open_to_read"):
        with monkeypatch.context() as patch:
            patch.setattr(files, reader, fail)
            with pytest.raises(Exception, match="Input/output error") as caught:
                store.load("one")
            assert not isinstance(caught.value, SessionCorruptError)


def test_a_mismatch_is_told_before_rows_are_read(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "read_into", None)
    with pytest.raises(SessionMismatchError):
        store.load("one", {"model": "n"})


def test_a_renamed_or_copied_folder_goes_by_its_new_name(store: SessionStore) -> None:
    shutil.copytree(store.root / "one", store.root / "two")
    (store.root / "one").rename(store.root / "three")
    assert store.names() == ["three", "two"]
    assert [store.load(name).name for name in store.names()] == ["three", "two"]
    with pytest.raises(SessionNotFoundError):
        store.load("one")


# --- the catalogue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["remove", "empty", "noise", "middle"])
def test_a_catalogue_that_is_lost_or_damaged_is_made_anew(store: SessionStore, spoil: str) -> None:
    save(store, "two", tag=1)
    before = [(info.name, info.identity, info.state, info.bytes) for info in store.infos()]
    path = store.catalogue.path
    store.catalogue.close()
    data = path.read_bytes()
    if spoil == "remove":
        path.unlink()
    else:
        new = {"empty": b"", "noise": os.urandom(len(data)), "middle": data[:4096] + b"\xff" * 4096 + data[8192:]}
        path.write_bytes(new[spoil])
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
    other = SessionStore(store.root)
    assert spoil in ("remove", "empty") or upkeep.verify(other) != []
    assert [(info.name, info.identity, info.state, info.bytes) for info in other.infos()] == before
    upkeep.collect(other)
    assert upkeep.verify(other) == []
    assert other.longest_prefix(list(range(1, 200)), {"model": "m"})[0].name == "two"


def test_a_row_of_the_catalogue_that_was_changed_is_found(store: SessionStore) -> None:
    with store.catalogue._open() as base:
        assert base is not None
        base.execute("UPDATE sessions SET state = replace(state, 'turns', 'burns')")
    (problem,) = upkeep.verify(store)
    assert str(store.catalogue.path) in problem.line()
    assert store.infos()[0].state["turns"] == [1, {"a": None}], "it is not believed"
    with store.catalogue._open() as base:
        assert base is not None
        base.execute("UPDATE prefixes SET hash = zeroblob(16) WHERE pages = 2")
    (problem,) = upkeep.verify(store)
    assert "prefixes" in problem.line()


def test_a_count_of_pages_in_the_catalogue_that_was_changed_is_found(store: SessionStore) -> None:
    with store.catalogue._open() as base:
        assert base is not None
        base.execute("UPDATE prefixes SET pages = pages + 1024 WHERE pages = 2")
    (problem,) = upkeep.verify(store)
    assert "prefixes" in problem.line()


@pytest.mark.parametrize("spoilt", ["NULL", "'many'", "x'00'"])
def test_a_count_of_pages_that_is_none_is_not_believed(store: SessionStore, spoilt: str) -> None:
    with store.catalogue._open() as base:
        assert base is not None
        base.execute(f"UPDATE prefixes SET pages = {spoilt}")
    assert store.longest_prefix(list(range(130)), {"model": "m"}) == []
    (problem,) = upkeep.verify(store)
    assert "prefixes" in problem.line()


def test_a_text_of_the_catalogue_that_became_bytes_is_not_believed(store: SessionStore) -> None:
    with store.catalogue._open() as base:
        assert base is not None
        base.execute("UPDATE sessions SET state = CAST(state AS BLOB)")
    assert any("fails its checksum" in problem.line() for problem in upkeep.verify(store))
    assert store.infos()[0].state["turns"] == [1, {"a": None}]


def test_a_catalogue_that_is_held_is_not_taken_for_damaged(store: SessionStore) -> None:
    store.hit("one", 64)
    store.catalogue.close()
    held = sqlite3.connect(store.catalogue.path)
    held.execute("PRAGMA locking_mode = EXCLUSIVE")
    held.execute("PRAGMA journal_mode = DELETE")
    held.execute("BEGIN EXCLUSIVE")
    before, other = store.catalogue.path.read_bytes(), SessionStore(store.root)
    connect = sqlite3.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda path, **options: connect(path, **options | {"timeout": 0}))
        with pytest.raises(SessionError, match="can't be read now"):
            upkeep.verify(other)
        assert upkeep.collect(other).files == [] and store.catalogue.path.read_bytes() == before
    held.close()
    assert upkeep.verify(other) == [] and other.show("one").hits == 1


def test_an_exported_file_is_checked(store: SessionStore, tmp_path: Path) -> None:
    path = archive.export(store, "one", tmp_path / "carried.longspan")
    assert upkeep.verify_file(path) == []
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert upkeep.verify_file(path) != []
        try:
            archive.import_(store, path, "back")
        except SessionCorruptError as error:
            assert str(path) in str(error)
            assert not store.exists("back")
        else:  # in zeros
            assert store.load("back").texts == TEXTS
            store.remove("back")
    path.write_bytes(whole)
    assert archive.import_(store, path, "back") == "back"
    assert store.load("back").state == store.load("one").state


def test_an_export_goes_over_what_an_interrupted_one_left(store: SessionStore, tmp_path: Path) -> None:
    left = tmp_path / f".carried.longspan{files.PART}"
    left.write_bytes(bytes(1 << 20))
    handle = locks.take(left)
    with pytest.raises(UsageError, match="another process"):
        archive.export(store, "one", tmp_path / "carried.longspan")
    os.close(handle)
    path = archive.export(store, "one", tmp_path / "carried.longspan")
    assert upkeep.verify_file(path) == [] and list(tmp_path.iterdir()) == [path]


def test_an_imported_session_has_its_own_name_unless_it_gets_another(store: SessionStore, tmp_path: Path) -> None:
    path = archive.export(store, "one", tmp_path / "two.longspan")
    store.remove("one")
    assert archive.import_(store, path) == "one"
    for name in ("", "../one", ".one"):
        with pytest.raises(UsageError, match="can't name a session"):
            archive.import_(store, path, name)
    carried = Journal.open(path)
    about = carried.commit().told | {"name": "../../elsewhere"}
    forged = Appender.alone(tmp_path / "forged.longspan", 1)
    forged.commit(about | {"tensors": {}, "texts": [], "prefix": 0})
    with pytest.raises(UsageError, match="can't name a session"):
        archive.import_(store, tmp_path / "forged.longspan")


def test_what_was_promised_while_room_was_made_stays(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep("one", False)
    real = locks._acquire

    def late(path: Path, wait: bool) -> int:
        if not wait:
            monkeypatch.setattr(locks, "_acquire", real)
            SessionStore(store.root).keep("one")  # by another process, after the first look
        return real(path, wait)

    monkeypatch.setattr(locks, "_acquire", late)
    upkeep._shrink(store, 0, upkeep.Collected(), None)
    assert locks._acquire is real and store.show("one").kept
