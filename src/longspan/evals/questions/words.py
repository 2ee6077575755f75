"""Words for keys and lists: `words.txt`, and compounds of it without end.

The same on every machine: nothing installed is asked. It does not know tasks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_FILE = Path(__file__).with_name("words.txt")


@lru_cache(maxsize=1)
def sections() -> dict[str, tuple[str, ...]]:
    """Return the words of each kind: `nouns`, `adjectives`, `verbs`."""
    found: dict[str, list[str]] = {}
    kind = ""
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kind = line.strip("[]")
        elif line and not line.startswith("#"):
            found.setdefault(kind, []).extend(line.split())
    return {kind: tuple(words) for kind, words in found.items()}


@lru_cache(maxsize=1)
def single() -> tuple[str, ...]:
    """Return all words, each once, sorted."""
    return tuple(sorted({word for words in sections().values() for word in words}))


def compounds(rng: random.Random) -> Iterator[str]:
    """Yield pairs such as `brisk-lantern`, each once; a second adjective joins once half of all pairs are drawn."""
    adjectives, nouns = sections()["adjectives"], sections()["nouns"]
    seen: set[str] = set()
    while True:
        parts = [rng.choice(adjectives), rng.choice(nouns)]
        if 2 * len(seen) > len(adjectives) * len(nouns):
            parts.insert(0, rng.choice(adjectives))
        word = "-".join(parts)
        if word not in seen:
            seen.add(word)
            yield word
