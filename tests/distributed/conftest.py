"""Four ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks that are started once."""
    started = Ranks(tmp_path_factory.mktemp("ranks"), 4)
    yield started
    started.close()
