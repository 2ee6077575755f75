"""Folders in memory where there are any: these tests sync thousands of times, and can't see what a sync does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from longspan.sessions.store import SessionStore

SHM = Path("/dev/shm")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    if not SHM.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="longspan-test-", dir=SHM))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = SessionStore(place / "deep" / "sessions")
    yield store
    store.catalogue.close()
