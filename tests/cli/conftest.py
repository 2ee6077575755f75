"""A tiny model with random weights in a folder, a calibration for it, and folders of our own for all that is kept."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_process import command

TEXT = "The harbour board met in May. The code of the gate is 7315. Lise keeps the spare key, and Tom the other one. "


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three layers with a window of 512 tokens."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny", window=512)


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a window so large that an answer goes on until it is stopped."""
    return make_model(tmp_path_factory.mktemp("models") / "endless", window=1 << 20)


def make_model(folder: Path, window: int) -> Path:
    from tiny_llama import save_model

    # Weights so small that every token is about as likely: an answer does not end by itself.
    return save_model(folder, max_position_embeddings=window, initializer_range=0.02)


@pytest.fixture(scope="session")
def calibrated(tiny_model: Path, endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with retrieval heads for both models: random weights have none that could be found."""
    from longspan.hf.loading import load
    from longspan.retrieval import heads

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSPAN_CACHE", str(cache))
        for folder in (tiny_model, endless_model):
            model = load(str(folder), device="cpu")
            heads.store(model.fingerprint, heads.RetrievalHeads(((1, 0), (1, 3))), {"model": folder.name})
    return cache


@pytest.fixture
def home(calibrated: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own to work in, with a text in it; nothing outside it is read or written."""
    for name in ("CACHE", "DATA", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("LONGSPAN_CACHE", str(calibrated))
    monkeypatch.setenv("LONGSPAN_SESSIONS", str(tmp_path / "sessions"))
    monkeypatch.setenv("LONGSPAN_MODEL", str(tiny_model))
    monkeypatch.setenv("LONGSPAN_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("LONGSPAN_DEBUG", "PYTHONIOENCODING", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minutes.txt").write_text(TEXT * 4, encoding="utf-8")
    return tmp_path


Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def longspan(home: Path) -> Run:
    """Runs the command line in a process of its own."""

    def run(
        *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command(*arguments), input=stdin, capture_output=True, env={**os.environ, **(env or {})}, check=False
        )

    return run


@pytest.fixture
def cli(home: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process, which spares loading torch; gives exit code, stdout and stderr."""
    from longspan.cli import run

    def call(*arguments: str) -> tuple[int, str, str]:
        capfdbinary.readouterr()
        code = run(arguments)
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return call
