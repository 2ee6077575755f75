"""The retrieval heads of a model: which they are, and where a calibration of them is stored.

A calibration belongs to a model's weights (its fingerprint), not to its name. Those of the catalogue's models come with
Longspan; others are found once (`calibrate.py`) and kept in the cache.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from longspan import settings
from longspan.errors import ModelError

Head = tuple[int, int]
"""Layer and query head, both from 0."""


@dataclass(frozen=True)
class RetrievalHeads:
    """The heads whose attention mass ranks pages."""

    heads: tuple[Head, ...]
    first: tuple[float, ...] = ()
    """How often each ranked the right page first in calibration."""
    sinks: int = 4
    """First tokens of a context that no search counts: they gather mass from queries that look for nothing."""

    def __post_init__(self) -> None:
        """Refuse a calibration without heads (ModelError)."""
        if not self.heads:
            raise ModelError("a calibration must name at least one retrieval head: calibrate the model again")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {"heads": [list(head) for head in self.heads], "first": list(self.first), "sinks": self.sinks}

    @classmethod
    def from_json(cls, data: Any) -> RetrievalHeads:
        """Read what `to_json` wrote (ModelError if it is something else)."""
        try:
            heads = tuple((int(layer), int(head)) for layer, head in data["heads"])
            return cls(heads, tuple(float(rate) for rate in data.get("first", [])), int(data.get("sinks", 4)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError("a stored calibration of retrieval heads is damaged: remove it from the cache") from error


def stored(fingerprint: str) -> RetrievalHeads | None:
    """Return the calibration of the model with this fingerprint, if there is one."""
    shipped = resources.files("longspan.retrieval") / "calibrated" / f"{fingerprint}.json"
    for place in (shipped, _cached(fingerprint)):
        if place.is_file():
            try:
                return RetrievalHeads.from_json(json.loads(place.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ModelError(f"the calibration in {place} is damaged: remove that file") from error
    return None


def store(fingerprint: str, heads: RetrievalHeads, about: dict[str, Any]) -> Path:
    """Keep a calibration in the cache and return its file (ModelError if it can't be written)."""
    target = _cached(fingerprint)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False, encoding="utf-8") as part:
            json.dump({**heads.to_json(), **about}, part, indent=1)
        Path(part.name).replace(target)
    except OSError as error:
        raise ModelError(
            f"can't store the calibration in {target.parent}: {error.strerror or error} (set LONGSPAN_CACHE)"
        ) from error
    return target


def _cached(fingerprint: str) -> Path:
    return settings.cache_folder() / "heads" / f"{fingerprint}.json"
