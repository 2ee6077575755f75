"""The catalogue's seal: any bit of the file is found, and nothing that was written is taken for damage."""

import os
import sqlite3

import pytest
import torch

from longspan.sessions import upkeep
from longspan.sessions.store import SessionStore


def saved(root, count=3):
    store = SessionStore(root)
    for i in range(count):
        store.save(f"s{i}", {}, {}, {"g": {"x": torch.full((9,), i)}}, {}, tokens=list(range(200)))
    store.remove("s0")  # leaves bytes that nothing uses
    store.catalogue.close()
    return store


def told(root):
    store = SessionStore(root)
    problems = [problem.line() for problem in upkeep.verify(store)]
    store.catalogue.close()
    return problems


def test_any_flipped_bit_is_found_used_or_not(tmp_path):
    path = saved(tmp_path).catalogue.path
    data, seal = path.read_bytes(), path.with_name(path.name + ".seal")
    assert told(tmp_path) == []
    whole = seal.read_bytes()

    def found(catalogue, beside):
        # What is found is put together anew by whoever opens the catalogue next.
        for end in ("-wal", "-shm"):
            path.with_name(path.name + end).unlink(missing_ok=True)
        path.write_bytes(catalogue)
        seal.write_bytes(beside)
        return any(str(path) in line for line in told(tmp_path))

    for at in range(17, len(data), len(data) // 25):
        assert found(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :], whole), at
    for at in range(0, len(whole), 3):
        assert found(data, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]), at
    assert not found(data, whole)


def test_what_was_written_since_is_no_damage_and_gc_mends_what_is(tmp_path):
    store = saved(tmp_path)
    path = store.catalogue.path
    child = os.fork() if hasattr(os, "fork") else -1
    if child == 0:
        SessionStore(tmp_path).save("more", {}, {}, {}, {})
        os._exit(0)  # killed before it sealed anything
    if child > 0:
        os.waitpid(child, 0)
    assert told(tmp_path) == []
    other = sqlite3.connect(path)  # writes the log back to the file, as the last who closes does
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    assert told(tmp_path) == []
    SessionStore(tmp_path).save("again", {}, {}, {}, {})
    assert told(tmp_path) == []
    saved(tmp_path / "other")
    damaged = SessionStore(tmp_path / "other")
    data = damaged.catalogue.path.read_bytes()
    damaged.catalogue.path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    assert str(damaged.catalogue.path) in upkeep.collect(damaged).files
    damaged.catalogue.close()
    assert told(tmp_path / "other") == []


@pytest.mark.parametrize("count", [1, 40])
def test_a_listing_reads_the_catalogue_alone(tmp_path, count, monkeypatch):
    saved(tmp_path, count + 1)
    expected = [(info.name, info.bytes) for info in SessionStore(tmp_path).infos()]
    monkeypatch.setattr(SessionStore, "opened", None)
    assert [(info.name, info.bytes) for info in SessionStore(tmp_path).infos()] == expected
    assert len(expected) == count
