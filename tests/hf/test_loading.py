"""What can't be loaded is told in one line that names the fix."""

import json
import logging

import pytest
import torch

from longspan.errors import ModelError, UnknownNameError, UsageError
from longspan.hf.loading import _quiet, load, pick_device, pick_dtype
from tiny_llama import save_model, save_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(kind, name, **options):
    with pytest.raises(kind) as caught:
        load(str(name), **{"device": "cpu", **options})
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["smollm3", "missing.gguf", "./no/such/folder", "/no/such/file.gguf", "a/b/c"])
def test_an_unknown_name_lists_the_known_ones(name):
    message = refused(UnknownNameError, name)
    assert name in message and "smollm2" in message


def test_a_folder_without_a_configuration(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(ModelError, tmp_path / "empty")


def test_a_folder_with_a_damaged_configuration(tmp_path):
    save_tokenizer(tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    assert str(tmp_path / "damaged") in refused(ModelError, tmp_path / "damaged")


def test_a_folder_with_a_configuration_alone(tmp_path):
    folder = save_model(tmp_path / "model")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert str(folder) in refused(ModelError, folder)


def test_a_folder_with_weights_cut_short(tmp_path):
    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(folder) in refused(ModelError, folder)


def test_a_model_of_an_unknown_kind(tmp_path):
    folder = save_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "notamodel"}))
    assert str(folder) in refused(ModelError, folder)


def test_a_reason_that_takes_several_lines_is_told_in_one(tmp_path):
    folder = save_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refused(ModelError, folder)
    assert "tokenizer" in message and not message.endswith(":") and len(message) > 150


def test_the_hubs_own_warnings_are_not_shown(caplog):
    hub = logging.getLogger("huggingface_hub.utils._http")
    before = logging.getLogger("huggingface_hub").level
    with _quiet():
        hub.warning("Retrying in 1s [Retry 1/5].")
    assert caplog.records == [] and logging.getLogger("huggingface_hub").level == before
    hub.warning("not ours to hide")
    assert len(caplog.records) == 1


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    assert "GGUF" in refused(ModelError, tmp_path / "notes.txt")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(64), b"no such thing at all" * 50])
def test_a_file_that_is_gguf_by_name_alone(tmp_path, cache, content):
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in refused(ModelError, tmp_path / "model.gguf")
    assert [path.name for path in cache.rglob("*") if path.is_file()] == []
    assert list((cache / "converted").iterdir()) == []


def test_a_cache_that_can_not_be_written(tmp_path, cache):
    cache.write_text("a file where the folder should be")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(ModelError, tmp_path / "model.gguf")


def test_unknown_devices(tmp_path):
    for name in ("gpu", "mps", "", "cpu:0", "CPU"):
        message = refused(UsageError, tmp_path, device=name)
        assert "auto, cpu or cuda" in message
    if not torch.cuda.is_available():
        for name in ("cuda", "cuda:0"):
            assert "--device cpu" in refused(UsageError, tmp_path, device=name)
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_transformers_stays_silent(tmp_path, capfd):
    load(str(save_model(tmp_path / "model")), device="cpu")
    capfd.readouterr()
    load(str(tmp_path / "model"), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_the_number_type_is_the_one_asked_for(tmp_path):
    folder = save_model(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load(str(folder), device="cpu", dtype=dtype)
        assert model.dtype == dtype and model.device.type == "cpu"
        assert not model.model.training
