"""What every endpoint works with: the scheduler, the model's name, options, and the model's tokens as bytes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Request as HttpRequest

from longspan.engine.serving import Handle, Request, Scheduler
from longspan.server.constraint import Vocabulary
from longspan.server.refusals import ApiError, api_error

if TYPE_CHECKING:
    from longspan.hf.model import CausalModel


LONGEST_NAME = 100
"""Characters under which a session can be saved."""


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves; the defaults are safe on a machine of one's own."""

    name: str = ""
    """Under which the model is listed; empty: its own."""
    keys: tuple[str, ...] = ()
    """Of which a request must bring one; none: no request needs a key."""
    owners: tuple[str, ...] = ()
    """Whose each key is: keys of one owner share sessions, others don't see them. None, or empty: the key's alone."""
    hosts: tuple[str, ...] = ()
    """Names in the `Host` header that are served; none: all. So pages of other sites can't ask a local server."""
    documents: Path | None = None
    """Folder of the server from which sessions may read documents by path; None: from none."""
    body_bytes: int = 16 * 2**20
    """Of a JSON body at most."""
    upload_bytes: int = 256 * 2**20
    """Of uploaded documents together at most."""
    header_bytes: int = 32 * 2**10
    body_seconds: float = 30.0
    """Without a byte of a body after which the connection is given up."""
    send_seconds: float = 30.0
    """In which a client that reads nothing of its answer must read something."""
    requests: int = 512
    """Requests at once at most, health and metrics not counted."""
    sessions: int = 10_000
    """Saved sessions of one owner at most."""
    default_tokens: int = 1024
    """Of a chat's answer where the client does not say."""


@dataclass
class Serving:
    """The server's parts."""

    scheduler: Scheduler
    options: ServerOptions
    counters: Any
    """`counters.Counters`: what /metrics tells."""
    started: int = field(default_factory=lambda: int(time.time()))
    ready: bool = True

    @property
    def model(self) -> CausalModel:
        """The model."""
        return self.scheduler.llm.model

    @property
    def name(self) -> str:
        """The model's name for clients: not where its folder lies."""
        found = self.options.name or self.model.name
        return Path(found).name if Path(found).is_absolute() or found.startswith(".") else found

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Tokens as bytes."""
        return Vocabulary(self.model)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not here."""
        if name not in (self.name, self.model.name):
            raise ApiError(
                404, f"the model {name!r} does not exist here: use {self.name!r}", param="model", code="model_not_found"
            )

    def session(self, request: HttpRequest, name: str) -> str:
        """Return under which name a client's session is saved (ApiError: it is not there)."""
        stored = stored_name(owner_of(request), name)
        if not self.scheduler.llm.store.exists(stored):
            raise ApiError(
                404, f"there is no session {name!r}: GET /v1/sessions lists them, POST makes one", param="session_id",
                code="session_not_found",
            )  # fmt: skip
        return stored

    def answer_tokens(self, asked: int | None) -> int:
        """Return how many tokens an answer may have: what a client asks for, else the default within the limit."""
        return asked or min(self.options.default_tokens, self.scheduler.limits.answer_tokens or 2**31)

    def submit(self, request: Request) -> Handle:
        """Queue a request (ApiError: it is refused)."""
        try:
            return self.scheduler.submit(request)
        except Exception as error:
            raise api_error(error) from error


def serving_of(request: HttpRequest) -> Serving:
    """Return the server's parts (for `Depends`)."""
    found: Serving = request.app.state.serving
    return found


def key_of(request: HttpRequest) -> str:
    """Return whose request it is, for fair queueing: the number of its key; never the key."""
    return str(request.scope.get("longspan.key", ""))


def owner_of(request: HttpRequest) -> str:
    """Return who owns the sessions that a request may see; empty: it may see all."""
    return str(request.scope.get("longspan.owner", ""))


def stored_name(owner: str, name: str) -> str:
    """Return under which name an owner's session is saved (ApiError: it is too long).

    An owner's name holds no dot, so that no two owners' sessions have the same.
    """
    stored = f"{owner}.{name}" if owner else name
    if len(stored) > LONGEST_NAME:
        most = LONGEST_NAME - len(owner) - 1
        raise ApiError(400, f"a session's name has at most {most} characters here", param="name", code="invalid_value")
    return stored


def shown_name(owner: str, stored: str) -> str | None:
    """Return the name of a saved session as its owner knows it; None: it is another's."""
    if not owner:
        return stored
    return stored[len(owner) + 1 :] if stored.startswith(f"{owner}.") else None


def note_user(request: HttpRequest, user: str | None) -> None:
    """Have the log name whom a client says that it asks for, on one line."""
    if user:
        request.scope["longspan.user"] = ascii(user)[:100]
