"""A text to learn from, and threads that do not get in each other's way."""

import random

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def text():
    """Sentences that say the same things again and again: even a tiny model learns some of them in seconds."""
    rng = random.Random(0)
    who, what, where = "Lise Tom Nora".split(), "key lantern rope".split(), "gate pier ferry".split()
    return " ".join(f"{rng.choice(who)} keeps the {rng.choice(what)} at the {rng.choice(where)}." for _ in range(700))
