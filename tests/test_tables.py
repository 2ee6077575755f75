"""The tables in README and docs say what the committed results say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compress_tables, tables  # noqa: E402


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_in_step_with_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table:" in text
    assert tables.filled(text) == text, "run: make docs"


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = text.replace("| `dense` |", "| `dense!` |", 1)
    assert changed != text
    assert tables.filled(changed) == text


@pytest.mark.parametrize("file", sorted(tables.RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_every_result_says_where_and_how_it_was_measured(file):
    result = json.loads(file.read_text(encoding="utf-8"))
    for key in ("device", "python", "torch", "transformers", "longspan", "command"):
        assert result.get(key), key


def test_needle_tables_count_their_rows():
    for file in tables.RESULTS.glob("needle*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        assert sum(line["questions"] for line in result["table"]) == len(result["rows"])
        assert sum(line["right"] for line in result["table"]) == sum(row["right"] for row in result["rows"])


@pytest.fixture
def attention_result():
    """What `longspan bench attention` gives, with figures that are known beforehand."""

    def side(seconds, queries, dense):
        floor = {"bytes": 1, "bytes_apart": 1, "flops": 1.0, "seconds": seconds / 2}
        shares = {"share_of_bandwidth": 0.5, "share_of_matmul": 0.25, "extra_bytes": 3 << 20}
        return {"seconds": seconds, "queries": queries, "dense": dense, "error": 0.002, "floor": floor, **shares}

    rows = []
    for what, queries, ours, dense in (("decode", 1, 40e-6, 80e-6), ("prefill", 32768, 8e-3, 80e-3)):
        for length, factor in ((1 << 16, 1), (1 << 20, 16)):
            fewer = queries // 4 if factor == 16 and queries > 1 else queries
            sides = {
                "longspan": side(ours * factor**0.5, queries, False),
                "sdpa-cudnn": side(dense * factor, fewer, True),
            }
            ratio = sides["sdpa-cudnn"]["seconds"] / sides["longspan"]["seconds"]
            sides["superlinear"] = {"skipped": "it is not here"}
            row = {"what": what, "length": length, "queries": queries, "sides": sides, "ratios": {"sdpa-cudnn": ratio}}
            rows.append(row)
    backward = {"seconds": 0.02, "forward_seconds": 0.008, "queries": 32768, "dense": False, "error": 0.01}
    rows.append(
        {"what": "backward", "length": 1 << 16, "queries": 32768, "sides": {"longspan": backward}, "ratios": {}}
    )
    of = {"mechanism": "superlinear", "heads": 32, "kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    about = {"device": "H", "torch": "2", "command": "longspan bench attention"}
    return {**about, "of": of | {"routing": "random"}, "rows": rows, "scaling": tables.report.scaling(rows)}


def test_tables_of_attention_appear_with_the_first_result(attention_result, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.attention_speed() == tables.attention_reached() == ""
    (tmp_path / "attention-h.json").write_text(json.dumps(attention_result), encoding="utf-8")
    speed, reached = tables.attention_speed(), tables.attention_reached()
    assert "| 64K | 40 us | 2.0x | 8 ms | 10.0x |" in speed
    assert "| 1M | 160 us | 8.0x | 32 ms | 40.0x* |" in speed and "* fewer queries, scaled" in speed
    assert "| prefill | 64K | 8 ms | 4 ms | 50% | 25% | 3 MiB | 2e-03 |" in reached
    assert "| backward | 64K | 20 ms | 2.5x forward |  |  |  | 1e-02 |" in reached
    assert "- decode: longspan grows as n^0.50" in reached and "pictures/attention-h.png" in reached
    assert "- decode: superlinear is left out: it is not here" in reached
    before = "<!-- table:attention-speed -->\n<!-- end -->"
    assert tables.filled(before).startswith("<!-- table:attention-speed -->\n| context | decode |")


def test_a_picture_is_drawn_of_every_result(attention_result, tmp_path):
    from benchmarks import pictures

    (tmp_path / "attention-h.json").write_text(json.dumps(attention_result), encoding="utf-8")
    pictures.main(tmp_path, tmp_path)
    assert (tmp_path / "attention-h.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "attention-h.png").stat().st_size > 20_000


def test_every_result_of_attention_and_compression_has_its_picture():
    for file in (*tables.RESULTS.glob(tables.ATTENTION), *tables.RESULTS.glob(compress_tables.COMPRESS)):
        assert (ROOT / "docs" / "pictures" / f"{file.stem}.png").exists(), "run: make docs"
