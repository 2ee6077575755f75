"""One server with the tiny model for each file of tests, its folders its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import Live

from longspan import LLM
from longspan.hf.model import CausalModel
from longspan.sessions.store import SessionStore


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Every test here runs on one thread."""


@pytest.fixture(scope="module")
def own_places(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSPAN_CACHE", str(calibrated))
        patch.setenv("LONGSPAN_SESSIONS", str(folder / "sessions"))
        patch.delenv("LONGSPAN_THREADS", raising=False)
        yield folder


@pytest.fixture(scope="module")
def live(tiny: CausalModel, own_places: Path) -> Iterator[Live]:
    with Live(LLM(tiny, "dense", store=SessionStore(own_places / "sessions"))) as made:
        yield made
