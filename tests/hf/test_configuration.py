"""Configurations by name: short names, folders, files and the hub's cache; nothing is fetched here."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from longspan.errors import ModelError, UnknownNameError
from longspan.hf.catalogue import CATALOGUE
from longspan.hf.configuration import configuration, short


def test_short_names_in_any_case_and_hub_names_give_the_same():
    found = configuration("llama-3.1-8b")
    assert found.name == "Llama-3.1-8B" and found.fields["num_key_value_heads"] == 8
    assert configuration("Llama-3.1-8B") == configuration("meta-llama/Llama-3.1-8B-Instruct") == found
    found.fields.clear()
    assert configuration("llama-3.1-8b").fields, "a caller's changes stay with the caller"


def test_every_model_with_a_short_name_has_a_configuration():
    for name in (*CATALOGUE, *short()):
        assert configuration(name).fields["model_type"]
    for name, entry in short().items():
        assert name == name.lower() and {"title", "hub", "parameters_billion", "config"} <= entry.keys()


def test_folders_and_files(tmp_path):
    (tmp_path / "own").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        configuration(str(tmp_path / "own"))
    file = tmp_path / "own" / "config.json"
    file.write_text(json.dumps({"hidden_size": 3}), encoding="utf-8")
    assert configuration(str(tmp_path / "own")) == configuration(str(file))
    assert configuration(str(file)).name == "own"
    for damaged in ("{", "[1]", ""):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(ModelError) as caught:
            configuration(str(file))
        assert "\n" not in str(caught.value)


def test_what_has_no_configuration_is_told(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="name a folder"):
        configuration(str(tmp_path / "model.gguf"))
    for name in ("llama", "", "a/b/c"):
        with pytest.raises(UnknownNameError, match=r"llama-3\.1-8b"):
            configuration(name)
    with pytest.raises(ModelError, match="no hub name"):
        configuration("a b/c")


def test_a_hub_name_comes_from_the_cache_or_is_refused_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    level = logging.getLogger("huggingface_hub").level
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": 5}', encoding="utf-8")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, which: str(file))
    assert configuration("owner/model").fields == {"hidden_size": 5}
    assert configuration("owner/model").name == "owner/model"

    def offline(name, which):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, which: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ModelError, match="no network") as caught:
        configuration("owner/model")
    assert "\n" not in str(caught.value)
    assert logging.getLogger("huggingface_hub").level == level


def test_it_loads_neither_torch_nor_transformers():
    code = "import sys, longspan.hf.configuration as c; c.configuration('qwen3-4b'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
