"""What all tests share: helpers that are imported by name, and a tiny model to run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from longspan import settings

settings.share_cores()

if shutil.which("nvidia-smi") is None:
    # Kernels run in Triton's interpreter; it is read as Triton is imported, which other libraries do unasked.
    os.environ["TRITON_INTERPRET"] = "1"

# Helpers beside the tests (plain.py) are imported by name; those in this folder are found as it is.
sys.path.insert(0, str(Path(__file__).parent / "attention"))

if TYPE_CHECKING:
    from longspan import LLM
    from longspan.hf.model import CausalModel


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For shapes this small, threads cost twenty times what they gain on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a window of 1024 tokens."""
    from tiny_llama import WINDOW, save_model

    return save_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=WINDOW)


@pytest.fixture(scope="session")
def tiny(folder: Path) -> CausalModel:
    import torch

    from longspan.hf.loading import load

    return load(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def calibrated(tiny: CausalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with retrieval heads of the tiny model: random weights have none that could be found."""
    from longspan.retrieval import heads

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSPAN_CACHE", str(cache))
        heads.store(tiny.fingerprint, heads.RetrievalHeads(((1, 0), (2, 1), (2, 3))), {})
    return cache


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside the test's folder is read or written."""
    cache = tmp_path / "cache"
    if "calibrated" in request.fixturenames:
        cache = request.getfixturevalue("calibrated")
    monkeypatch.setenv("LONGSPAN_CACHE", str(cache))
    monkeypatch.setenv("LONGSPAN_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.delenv("LONGSPAN_THREADS", raising=False)


@pytest.fixture
def make_llm(tiny: CausalModel, calibrated: Path) -> Callable[..., LLM]:
    """Makes an engine around the tiny model; each has a store of its own over the same folder."""
    from longspan import LLM

    def make(attention: str | None = None, **options: object) -> LLM:
        return LLM(tiny, attention, **options)

    return make
