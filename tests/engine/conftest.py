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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loads each family of hybrid models once: the model, and what transformers alone makes of the same weights."""
    import torch

    from longspan.hf.loading import load, plain_transformers
    from tiny_hybrid import save_hybrid

    known = {}

    def get(family):
        if family not in known:
            folder = save_hybrid(tmp_path_factory.mktemp("hybrids") / family, family)
            model = load(str(folder), device="cpu", dtype=torch.float32)
            known[family] = model, plain_transformers(model)
        return known[family]

    return get


@pytest.fixture(scope="module")
def nemotron(models):
    return models("nemotron_h")[0]


@pytest.fixture(scope="module")
def tokens(nemotron, text):
    return (nemotron.tokens(text) * 3)[:1000]


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every chunk of documents."""
    from longspan.engine import recurrence

    monkeypatch.setattr(recurrence, "LEAST", 1)
    monkeypatch.setattr(recurrence, "SHARE", 1e9)
