"""Small chunks, one thread, folders of our own, and a text."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(one_thread: None, places: None) -> None:
    """Every test here runs so."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a text of some hundred tokens is read in several."""
    from longspan.engine import contexts
    from tiny_llama import CHUNK

    monkeypatch.setattr(contexts, "CHUNK", CHUNK)


@pytest.fixture(scope="session")
def text() -> str:
    """About 400 tokens in which no two pages are alike: four chunks."""
    places = ["gate", "cellar", "ferry", "pier", "tower", "archive", "museum", "harbour", "market", "bridge"]
    return " ".join(f"The code of the {places[i % 10]} in street {i * 7 % 40} is {i * i + 7315}." for i in range(13))
