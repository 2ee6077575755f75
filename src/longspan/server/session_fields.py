"""The bodies of `/v1/sessions`, and what is told of a session."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from longspan.server.fields import Drawn, SessionId, Strict
from longspan.sessions.store import SessionInfo

Text = Annotated[str, Field(min_length=1)]


class DocumentText(Strict):
    """A document's text."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "text"
    text: Text


class DocumentPath(Strict):
    """A document in the server's folder of documents."""

    path: Annotated[str, Field(min_length=1, max_length=1000)] = Field(
        description="Below the folder that the server was started with (--documents)."
    )


Given = DocumentText | DocumentPath


class SessionCreate(Strict):
    """A new session."""

    name: SessionId
    documents: Annotated[list[Given], Field(max_length=1000)] = Field(default_factory=list)


class DocumentsAdd(Strict):
    """Documents that a session is to read."""

    documents: Annotated[list[Given], Field(min_length=1, max_length=1000)]


class SessionAsk(Drawn):
    """A question about a session's documents."""

    question: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    remember: bool = Field(True, description="Question and answer join the conversation, which later questions see.")
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(0.0)
    n: None = None


class SessionFork(Strict):
    """The name of a session that goes its own way."""

    name: SessionId


class SessionRestore(Strict):
    """Where to go back to."""

    commit: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(None, description="None: the last that is whole.")


class DocumentTold(BaseModel):
    """What is told of a document."""

    name: str
    tokens: int


class SessionTold(BaseModel):
    """What is told of a session."""

    id: str
    object: str = "session"
    documents: list[DocumentTold] = Field(default_factory=list)
    turns: int = 0
    bytes: int = Field(0, description="On disk.")
    created: datetime | None = None
    saved: datetime | None = None
    used: datetime | None = None
    problem: str | None = Field(None, description="What is wrong with its files.")


class SessionList(BaseModel):
    """Sessions."""

    object: str = "list"
    data: list[SessionTold]


class Deleted(BaseModel):
    """What was deleted."""

    id: str
    object: str = "session.deleted"
    deleted: bool = True


def of_info(info: SessionInfo, name: str) -> SessionTold:
    """Return what is told of a saved session, by its owner's name for it."""
    state: Any = info.state
    documents = [
        DocumentTold(name=str(each["name"]), tokens=int(each["last"]) - int(each["first"]))
        for each in state.get("documents", ())
    ]
    turns = state.get("turns", 0)
    problem = None if info.problem is None else "its files are damaged, or of a later version"
    return SessionTold(
        id=name,
        documents=documents,
        turns=len(turns) if isinstance(turns, list) else int(turns),
        bytes=info.bytes,
        created=info.created,
        saved=info.saved,
        used=info.used,
        problem=problem,
    )
