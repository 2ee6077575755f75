"""Rows as evals write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from longspan.evals.asking.rows import Key, Row
from longspan.evals.journal import Entry

HERE = {"run": "r", "device": "a machine", "model": "models/tiny", "longspan": "0.1.0"}


@pytest.fixture(scope="session")
def entry() -> Callable[..., Entry]:
    """Makes an answered question: the fields of a row that a test names, and some for the others."""

    def make(score: float = 1.0, number: int = 0, *, about: dict[str, Any] | None = None, **given: Any) -> Entry:
        key = Key("ruler", "vt", 4096, 0, number, "", "q", "f" * 32, "float32", "dense", "", "dense", "", "auto", 0, "")
        other = {
            "run": "r", "model": "models/tiny", "parameters": {}, "tokens": 4000, "depths": [], "scoring": "all",
            "score": score, "chance": 0.0, "error": "", "read_by": "dense", "read_tokens": 9, "seconds": 1.0,
            "read_tokens_per_s": 1.0, "kept_bytes": 0, "first_token_s": 1.0, "decode_tokens_per_s": 0.0,
            "measures": {}, "answer": "seven", "wanted": ["7"],
        }  # fmt: skip
        if "mechanism" in given:
            given.setdefault("attention", given["mechanism"])
        return Entry(asdict(Row(**{**asdict(key), **other, **given})), about or HERE)

    return make
