"""What haystacks and questions are made of: prose, and documents with questions.

It does not know tasks. Prose is what every Python installation holds (`evals/haystack.py`), which differs between
versions of Python, unless the user names documents of their own.
"""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import dataclass, field
from functools import cached_property

from longspan.errors import UsageError
from longspan.evals.haystack import prose
from longspan.evals.questions.passages import Library, shipped
from longspan.evals.questions.words import sections

_LEAST = 200
"""Words that prose must have to hide anything in it."""


@dataclass(frozen=True)
class Sources:
    """Where texts come from."""

    essay: str | None = None
    """Prose for the haystacks of `essay` tasks; None: `haystack.prose`."""
    single: Library = field(default_factory=lambda: shipped()[0])
    """Questions that need one document."""
    hops: Library = field(default_factory=lambda: shipped()[1])
    """Questions that need two."""

    def __post_init__(self) -> None:
        """Refuse prose that is too short."""
        if self.essay is not None and len(self.words) < _LEAST:
            raise UsageError(f"the text for haystacks has {len(self.words)} words: give at least {_LEAST}")

    @cached_property
    def words(self) -> list[str]:
        """The prose as words, with all white space between them made one space."""
        return re.split(r"\s+", (prose() if self.essay is None else self.essay).strip())

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """The prose's different words, without case and without what is no letter around them."""
        return frozenset(word.strip(string.punctuation).casefold() for word in self.words)

    @cached_property
    def digest(self) -> str:
        """A hash of all that questions are made of: 16 hexadecimal digits."""
        made = hashlib.blake2b(digest_size=8)
        for part in (self.words, self.single, self.hops, sections()):
            made.update(repr(part).encode("utf-8", "backslashreplace"))
        return made.hexdigest()
