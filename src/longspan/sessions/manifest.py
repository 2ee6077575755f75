"""What a commit of a session says: whose it is, what it goes by, and which rows it consists of.

It also tells damage and differences in the words that people read. It knows nothing of files or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, Union

from longspan.errors import SessionCorruptError, SessionMismatchError, UsageError

JSON: TypeAlias = Union[bool, int, float, str, Sequence["JSON"], Mapping[str, "JSON"], None]  # noqa: UP007

FORMAT = 2
"""Of what a commit says."""


class VanishedError(SessionCorruptError):
    """A file is not there: damage, unless another process has just committed or removed the session."""


class NewerFormatError(SessionCorruptError):
    """The session was written by a later version, and is fine."""


@dataclass(frozen=True)
class Manifest:
    """One commit."""

    name: str
    created: datetime
    saved: datetime
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By group and name: type, shape, axis, step and rows of each tensor (`rows.TensorSource.about`)."""
    texts: Sequence[str] = ()
    """Names of the texts."""
    prefix: int = 0
    """Pages of tokens whose hash chain is saved (`prefixes.py`)."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of longspan and what it ran on; told, never compared."""
    kept: bool = True
    """Whether it stays until somebody removes it; else it may go when room or its time runs out."""
    ttl: float | None = None
    """Seconds after its last use in which one that is not kept stays; None: as long as there is room."""
    parent: str | None = None
    """The session it was forked from."""
    id: str = ""
    """Of what was saved: another with every save, the same where files alone are written anew."""

    def told(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "format": FORMAT,
            "name": self.name,
            "created": self.created.isoformat(),
            "saved": self.saved.isoformat(),
            "identity": self.identity,
            "state": self.state,
            "tensors": self.tensors,
            "texts": list(self.texts),
            "prefix": self.prefix,
            "versions": self.versions,
            "kept": self.kept,
            "ttl": self.ttl,
            "parent": self.parent,
            "id": self.id,
        }


def manifest_of(told: Mapping[str, Any], name: str, path: Path) -> Manifest:
    """Return what a commit says, under the name that its folder bears.

    Raises NewerFormatError for a later version's, SessionCorruptError for what is no commit.
    """
    try:
        if int(told["format"]) > FORMAT:
            raise NewerFormatError(later(name, path, f"has format {told['format']}, and this version reads {FORMAT}"))
        return Manifest(
            name=name,
            created=datetime.fromisoformat(told["created"]),
            saved=datetime.fromisoformat(told["saved"]),
            identity=dict(told["identity"]),
            state=dict(told["state"]),
            tensors={str(group): dict(held) for group, held in told["tensors"].items()},
            texts=[str(text) for text in told["texts"]],
            prefix=int(told["prefix"]),
            versions=dict(told["versions"]),
            kept=bool(told["kept"]),
            ttl=None if told["ttl"] is None else float(told["ttl"]),
            parent=None if told["parent"] is None else str(told["parent"]),
            id=str(told["id"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SessionCorruptError(damage(name, path, "holds a commit that is none of a session")) from error


def as_json(what: str, value: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return a mapping as JSON gives it back (tuples as lists). Raises UsageError if JSON can't hold it."""
    try:
        held: dict[str, JSON] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the session's {what} can't be saved as JSON: {error}") from error
    return held


def compare(name: str, identity: Mapping[str, JSON], asked: Mapping[str, JSON]) -> None:
    """Raise SessionMismatchError at the first key of `asked` that was saved with another value (none is null)."""
    for key, value in asked.items():
        saved = identity.get(key)
        if saved == value:
            continue
        raise SessionMismatchError(
            f"session {name!r} was saved with {_told(key, saved)}, and {_told(key, value)} is asked for: "
            "use what it was saved with, or another session name, or remove it with "
            f"`longspan session rm {name}`"
        )


def damage(name: str, path: Path, what: str) -> str:
    """Return the one line that tells of a damaged file, and what can be done."""
    return (
        f"session {name!r} is damaged: {path} {what}; restore the file from a backup, go back to the last commit that "
        f"is whole with `longspan session restore {name}`, or remove it with `longspan session rm {name}`"
    )


def later(name: str, path: Path, what: str) -> str:
    """Return the one line that tells of a session that a later version wrote."""
    return f"session {name!r} was saved by a later version of longspan: {path} {what}; update longspan"


def _told(key: str, value: JSON) -> str:
    text = json.dumps(value)
    return f"no {key}" if value is None else f"{key} = {text if len(text) <= 120 else f'{text[:117]}...'}"
