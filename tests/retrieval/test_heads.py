"""Calibrations of retrieval heads: written and read back, damaged ones told, shipped ones there."""

import json
from importlib import resources

import pytest

from longspan.errors import ModelError
from longspan.hf import catalogue
from longspan.retrieval import heads
from longspan.retrieval.heads import RetrievalHeads

HEADS = RetrievalHeads(((2, 0), (2, 7), (11, 3)), (0.9, 0.875, 1.0), 5)
FINGERPRINT = "0" * 32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json_and_back():
    assert RetrievalHeads.from_json(json.loads(json.dumps(HEADS.to_json()))) == HEADS
    assert RetrievalHeads.from_json({"heads": [[1, 2]]}) == RetrievalHeads(((1, 2),), (), 4)


def test_a_calibration_is_kept_for_its_model_alone(cache):
    assert heads.stored(FINGERPRINT) is None
    file = heads.store(FINGERPRINT, HEADS, {"model": "tiny"})
    assert file.is_relative_to(cache) and json.loads(file.read_text())["model"] == "tiny"
    assert heads.stored(FINGERPRINT) == HEADS
    assert heads.stored("1" * 32) is None
    other = RetrievalHeads(((0, 0),))
    heads.store(FINGERPRINT, other, {})
    assert heads.stored(FINGERPRINT) == other
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "data",
    [None, 3, [], {}, {"heads": []}, {"heads": 3}, {"heads": [1]}, {"heads": [[1]]}, {"heads": [["a", "b"]]},
     {"heads": [[1, 2]], "first": ["often"]}, {"heads": [[1, 2]], "sinks": None}],
)  # fmt: skip
def test_a_damaged_calibration_is_told(cache, data):
    with pytest.raises(ModelError):
        RetrievalHeads.from_json(data)
    file = heads.store(FINGERPRINT, HEADS, {})
    file.write_text(json.dumps(data))
    with pytest.raises(ModelError) as caught:
        heads.stored(FINGERPRINT)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_a_calibration_that_is_no_json_is_told(cache, content):
    file = heads.store(FINGERPRINT, HEADS, {})
    file.write_bytes(content)
    with pytest.raises(ModelError, match="remove that file"):
        heads.stored(FINGERPRINT)


def test_a_cache_that_can_not_be_written_is_told(cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"can't store the calibration.*\(set LONGSPAN_CACHE\)"):
        heads.store(FINGERPRINT, HEADS, {})


def test_shipped_calibrations_load(cache):
    shipped = list((resources.files("longspan.retrieval") / "calibrated").iterdir())
    assert shipped
    for file in shipped:
        name, _, suffix = file.name.partition(".")
        assert suffix == "json" and len(name) == 32
        found = heads.stored(name)
        assert found is not None and len(found.first) == len(found.heads)
        assert all(0.5 <= rate <= 1 for rate in found.first)
        assert all(layer >= 0 and head >= 0 for layer, head in found.heads)


@pytest.mark.model
def test_the_default_model_has_a_shipped_calibration(monkeypatch, tmp_path):
    from longspan.hf.loading import load

    if not catalogue.entry("smollm2").cached:
        pytest.skip("the default model was not fetched yet")
    model = load("smollm2", device="cpu")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    found = heads.stored(model.fingerprint)
    assert found is not None
    assert all(layer < model.dimensions.layers and head < model.dimensions.query_heads for layer, head in found.heads)
