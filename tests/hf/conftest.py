"""One thread."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """Every test here runs so."""
