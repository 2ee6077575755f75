"""What is read of a context before it is asked about: all of it, what is retrieved for the question, or summaries.

A specification is a name and its options as one word (`specs.py`): `retrieved:passages=4`. How each is done with an
asker is the business of `asking/readers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from longspan import specs
from longspan.errors import UnknownNameError, UsageError

BY = ("lexical", "dense", "hybrid", "heads")
"""What may choose passages; all but the first need a model that runs here."""


@dataclass(frozen=True)
class Full:
    """All of it."""

    name: ClassVar[str] = "full"


@dataclass(frozen=True)
class Retrieved:
    """The passages that are chosen for the question, in their own order."""

    name: ClassVar[str] = "retrieved"
    by: str = "lexical"
    """`lexical` (BM25); `dense`: the model's own states, of passage and question alike; `hybrid`: both rankings joined
    (`retrieval/fusion.py`); `heads`: the model's retrieval heads, and words beside them, as `--attention retrieval`."""
    passages: int = 8
    """Passages at most: sentences of prose, lines, documents."""

    def __post_init__(self) -> None:
        """Refuse what is no choice."""
        if self.by not in BY:
            raise UsageError(f"retrieved: by={self.by} is unknown: use {', '.join(BY[:-1])} or {BY[-1]}")
        _at_least_one("retrieved", "passages", self.passages)


@dataclass(frozen=True)
class Summary:
    """Summaries of its chunks, which the same model writes."""

    name: ClassVar[str] = "summary"
    chunk: int = 1024
    """Tokens of text that are summed up together."""
    tokens: int = 96
    """Tokens of a summary."""
    focused: bool = True
    """Whether summaries are written for the question; else it comes after them."""

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to read."""
        _at_least_one("summary", "chunk", self.chunk)
        _at_least_one("summary", "tokens", self.tokens)


Reading = Full | Retrieved | Summary
_READINGS: dict[str, type[Full] | type[Retrieved] | type[Summary]] = {
    cls.name: cls for cls in (Full, Retrieved, Summary)
}


def parse(spec: str) -> Reading:
    """Make a reading from a specification (UsageError: an unknown name, option or value)."""
    name, options = specs.split(spec, "context")
    if name not in _READINGS:
        raise UnknownNameError(f"--context {name!r} is none of {', '.join(_READINGS)}")
    cls = _READINGS[name]
    return cls(**specs.checked(cls, options, "context", name, (field.name for field in fields(cls))))


def describe(reading: Reading) -> str:
    """Return the specification of a reading, without options at their defaults."""
    changed: dict[str, Any] = {
        field.name: getattr(reading, field.name)
        for field in fields(reading)
        if getattr(reading, field.name) != field.default
    }
    return specs.written(reading.name, changed)


def _at_least_one(name: str, option: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name}: {option}={value} is too small: it must be at least 1")
