"""The tables in README and docs say what the committed results say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tables  # noqa: E402


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
