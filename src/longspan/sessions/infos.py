"""What is told of a session: what a listing shows, what a load returns, what a request found. No torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from longspan.sessions.catalogue import Row
from longspan.sessions.manifest import JSON

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class SavedSession:
    """A session as it was saved; `bytes` is what its files take on disk, `number` counts its commits."""

    name: str
    created: datetime
    saved: datetime
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, str]
    bytes: int
    number: int = 0


@dataclass(frozen=True)
class SessionInfo:
    """What is known of a session without reading its tensors.

    `problem` is None, or one line that tells what is wrong with it: then only `name` and `bytes` hold.
    """

    name: str
    created: datetime | None
    saved: datetime | None
    bytes: int
    identity: Mapping[str, JSON]
    state: Mapping[str, JSON]
    problem: str | None = None
    used: datetime | None = None
    kept: bool = True
    """Whether it stays until somebody removes it."""
    ttl: float | None = None
    """Seconds after its last use in which one that is not kept stays."""
    hits: int = 0
    """Requests that found a prefix of theirs in it without asking for it."""
    hit_tokens: int = 0


@dataclass(frozen=True)
class Prefix:
    """A stored session that begins as a request does."""

    name: str
    tokens: int
    """How many tokens are the same, in whole pages."""


def info_of(row: Row) -> SessionInfo:
    """Return what the catalogue knows of a session."""
    return SessionInfo(
        row.name,
        datetime.fromisoformat(row.created),
        datetime.fromisoformat(row.saved),
        row.bytes,
        row.identity,
        row.state,
        None,
        datetime.fromtimestamp(row.used, UTC),
        row.kept,
        row.ttl,
        row.hits,
        row.hit_tokens,
    )
