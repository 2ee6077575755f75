"""One thread, and folders of our own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(one_thread: None, places: None) -> None:
    """Every test here runs so."""
