"""What a checkpoint says it was trained with: written, read again, and refused where it can't be."""

import json

import pytest
import torch

from longspan.attention import make
from longspan.errors import ModelError
from longspan.hf import trained
from longspan.hf.loading import load
from tiny_llama import save_model


class Config:
    """Holds any entry, as a configuration of transformers does."""


def test_an_ordinary_checkpoint_was_trained_with_nothing():
    found = trained.read("tiny", Config(), 3, 4)
    assert found.attention is None and found.gates is None and found.layer(2) is None
    (line,) = found.lacks(make("infini"), "tiny")
    assert "infini" in line and "tiny" in line and "\n" not in line
    assert found.lacks(make("streaming"), "tiny") == found.lacks(None, "tiny") == []


def test_what_was_recorded_is_read():
    config, gates = Config(), torch.randn(3, 4)
    trained.record(config, "infini", gates.double().requires_grad_())
    json.dumps(config.longspan)
    found = trained.read("tiny", config, 3, 4)
    assert found.attention == "infini" and torch.equal(found.gates, gates)
    assert torch.equal(found.layer(2), gates[2])
    assert found.lacks(make("infini"), "tiny") == []
    trained.record(config, "infini")
    assert trained.read("tiny", config, 3, 4).gates is None


@pytest.mark.parametrize(
    "entry,told",
    [
        ("infini", "names no attention"),
        ({}, "names no attention"),
        ({"attention": 3}, "names no attention"),
        ({"attention": "infini", "gates": 3}, "3 layers of 4"),
        ({"attention": "infini", "gates": [[0.0] * 4] * 2}, "3 layers of 4"),
        ({"attention": "infini", "gates": [[0.0] * 3] * 3}, "3 layers of 4"),
        ({"attention": "infini", "gates": [[0.0, 1.0, float("nan"), 2.0]] * 3}, "3 layers of 4"),
        ({"attention": "infini", "gates": [["0"] * 4] * 3}, "3 layers of 4"),
    ],
)
def test_an_entry_that_can_not_be_is_refused(entry, told):
    config = Config()
    config.longspan = entry
    with pytest.raises(ModelError, match=told) as caught:
        trained.read("tiny", config, 3, 4)
    assert "\n" not in str(caught.value)


def test_a_model_that_transformers_saved_keeps_its_entry(tmp_path):
    folder = save_model(tmp_path / "tiny")
    plain = load(str(folder), device="cpu", dtype=torch.float32)
    assert plain.trained.attention is None
    prints = {plain.fingerprint}
    for value in (0.5, 0.75):
        trained.record(plain.model.config, "infini", torch.full((3, 4), value))
        plain.model.save_pretrained(tmp_path / "taught")
        plain.tokenizer.save_pretrained(tmp_path / "taught")
        taught = load(str(tmp_path / "taught"), device="cpu", dtype=torch.float32)
        assert torch.equal(taught.trained.gates, torch.full((3, 4), value))
        prints.add(taught.fingerprint)
    assert len(prints) == 3, "sessions of one are not those of another"
