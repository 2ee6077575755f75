"""`/v1/sessions`: documents that are read once and asked often; each session is saved as soon as it changes.

Reading and answering are requests like any other; forking, saving and removing are done between two steps of the
engine or, where they wait for a disk, beside them, and wait for requests on that session. Whoever has a key sees the
sessions made with it alone (`Serving.stored`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, File, Path, UploadFile
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from longspan.engine.llm import LLM
from longspan.engine.residents import Residents
from longspan.engine.serving import Delta, Done, Event, Progress, Request
from longspan.server import answering, uploads, wording
from longspan.server.fields import SessionId
from longspan.server.refusals import ApiError
from longspan.server.serving import Serving, key_of, note_user, owner_of, serving_of, shown_name, stored_name
from longspan.server.session_fields import (
    Deleted,
    DocumentsAdd,
    SessionAsk,
    SessionCreate,
    SessionFork,
    SessionList,
    SessionRestore,
    SessionTold,
    of_info,
)
from longspan.sessions.session import Session

router = APIRouter(prefix="/v1/sessions", tags=["Sessions"])
Parts = Annotated[Serving, Depends(serving_of)]
Name = Annotated[SessionId, Path()]
_T = TypeVar("_T")


@router.post("", status_code=201, summary="Make a session")
async def create(body: SessionCreate, http: HttpRequest, serving: Parts) -> SessionTold:
    """Make a session, and have it read documents where some are given."""
    texts = await anyio.to_thread.run_sync(uploads.texts, body.documents, serving.options.documents)
    stored = stored_name(owner_of(http), body.name)
    llm, residents = serving.scheduler.llm, serving.scheduler.residents

    def make(_: None) -> None:
        _check_free(http, serving, body.name)
        made = llm.session(stored)
        llm.save(made)
        residents.hold(made)  # not before: one that can't be saved is not there

    await _done(serving, lambda *_: None, stored, make)
    if texts:
        await _read(http, serving, stored, texts)
    return await _told(http, serving, body.name)


@router.get("", summary="List sessions")
async def sessions(http: HttpRequest, serving: Parts) -> SessionList:
    """List the sessions that are saved, of whoever asks."""
    infos, owner = await anyio.to_thread.run_sync(serving.scheduler.llm.store.infos), owner_of(http)
    shown = [(info, shown_name(owner, info.name)) for info in infos]
    return SessionList(data=[of_info(info, name) for info, name in shown if name is not None])


@router.get("/{name}", summary="Show a session")
async def show(name: Name, http: HttpRequest, serving: Parts) -> SessionTold:
    """Tell what a session holds, at once, whatever is being read or answered."""
    return await _told(http, serving, name)


@router.delete("/{name}", summary="Delete a session")
async def delete(name: Name, http: HttpRequest, serving: Parts) -> Deleted:
    """Delete a session and its files; sessions forked from it stay."""
    stored, store = serving.session(http, name), serving.scheduler.llm.store
    await _done(serving, lambda _, residents: residents.forget(stored), stored, lambda _: store.remove(stored))
    return Deleted(id=name)


@router.post("/{name}/documents", summary="Have a session read documents")
async def append(name: Name, body: DocumentsAdd, http: HttpRequest, serving: Parts) -> SessionTold:
    """Have a session read documents given as text, or by a path below the server's folder of documents."""
    stored = serving.session(http, name)
    texts = await anyio.to_thread.run_sync(uploads.texts, body.documents, serving.options.documents)
    await _read(http, serving, stored, texts)
    return await _told(http, serving, name)


@router.post("/{name}/files", summary="Have a session read uploaded files")
async def upload(
    name: Name, http: HttpRequest, serving: Parts, files: Annotated[list[UploadFile], File(max_length=1000)]
) -> SessionTold:
    """Have a session read uploaded files: text, Markdown, source code, HTML, PDF, DOCX and others."""
    stored = serving.session(http, name)
    texts = []
    for file in files:
        content = await file.read()
        texts.append(
            await anyio.to_thread.run_sync(
                uploads.uploaded, file.filename or "upload", content, serving.options.upload_bytes
            )
        )
    await _read(http, serving, stored, texts)
    return await _told(http, serving, name)


@router.post("/{name}/ask", summary="Ask about a session's documents")
async def ask(name: Name, body: SessionAsk, http: HttpRequest, serving: Parts) -> Response:
    """Answer a question about a session's documents, with the passages that the answer rests on."""
    body.check_stream()
    note_user(http, body.user or body.safety_identifier)
    stored = serving.session(http, name)
    most = serving.answer_tokens(body.max_tokens)
    handle = serving.submit(
        Request(
            messages=[{"role": "user", "content": body.question}],
            session=stored,
            makes_session=False,
            params=body.params(most),
            key=key_of(http),
            remember=body.remember,
        )
    )
    answer = _Answer(name, serving)
    if body.stream:
        return await answering.stream(http, [handle], answer.events, serving.options.send_seconds)
    await answering.all_events(http, [handle], lambda _, event: answer.take(event))
    return answering.whole(answer.told())


@router.post("/{name}/fork", status_code=201, summary="Fork a session")
async def fork(name: Name, body: SessionFork, http: HttpRequest, serving: Parts) -> SessionTold:
    """Make a session that has read and been asked the same, and goes its own way; nothing is copied."""
    stored, other = serving.session(http, name), stored_name(owner_of(http), body.name)

    def work(llm: LLM, residents: Residents) -> Session:
        _check_free(http, serving, body.name)
        source = residents.get(stored, make=False)
        try:
            return llm.fork(source, other)
        finally:
            residents.release(stored, changed=False)

    def save(made: Session) -> Session:
        if made.saved_length < 0:  # nothing of it is on disk yet: somebody may have taken the name
            _check_free(http, serving, body.name)
        serving.scheduler.llm.save(made)
        serving.scheduler.residents.hold(made)
        return made

    await _done(serving, work, stored, save)
    return await _told(http, serving, body.name)


@router.post("/{name}/save", summary="Save a session")
async def save(name: Name, http: HttpRequest, serving: Parts) -> SessionTold:
    """Save what is new in a session; it is done after every change anyway."""
    stored, residents = serving.session(http, name), serving.scheduler.residents
    await _done(serving, lambda *_: None, stored, lambda _: residents.save(stored))
    return await _told(http, serving, name)


@router.post("/{name}/restore", summary="Go back to an earlier commit")
async def restore(name: Name, body: SessionRestore, http: HttpRequest, serving: Parts) -> SessionTold:
    """Go back to what a session was when it was saved before; what came after is forgotten for good."""
    stored, store = serving.session(http, name), serving.scheduler.llm.store

    def go_back(_: None) -> None:
        store.restore(stored, body.commit)

    await _done(serving, lambda _, residents: residents.forget(stored), stored, go_back)
    return await _told(http, serving, name)


# --- parts ---------------------------------------------------------------------------------------------------------


async def _done(
    serving: Serving, work: Callable[[LLM, Residents], _T], session: str, then: Callable[[_T], _T] | None = None
) -> _T:
    """Return what is done with a session locked, see `Scheduler.run` (ApiError: what it raised)."""
    try:
        return await asyncio.wrap_future(serving.scheduler.run(work, session, then))
    except Exception as error:
        raise answering.told(error) from error


async def _read(http: HttpRequest, serving: Serving, stored: str, texts: Sequence[tuple[str, str]]) -> None:
    """Have a session read; where the client goes away, what was read by then stays and is saved."""
    handle = serving.submit(Request(documents=texts, session=stored, makes_session=False, key=key_of(http)))
    await answering.all_events(http, [handle], lambda _, event: None)


async def _told(http: HttpRequest, serving: Serving, name: str) -> SessionTold:
    """Return what is known of a session: from disk, and turns, whose answers do not wait for the disk, from memory."""
    stored = stored_name(owner_of(http), name)

    def look() -> SessionTold:
        return of_info(serving.scheduler.llm.store.show(stored), name)

    try:
        told = await anyio.to_thread.run_sync(look)
    except Exception as error:
        raise answering.told(error) from error
    held = serving.scheduler.residents.peek(stored)
    return told if held is None else told.model_copy(update={"turns": len(held.turns)})


def _check_free(http: HttpRequest, serving: Serving, name: str) -> None:
    owner, most = owner_of(http), serving.options.sessions
    stored, store = stored_name(owner, name), serving.scheduler.llm.store
    if serving.scheduler.residents.peek(stored) is not None or store.exists(stored):
        raise ApiError(409, f"a session {name!r} is there already: choose another name, or delete it first",
                       param="name", code="session_exists")  # fmt: skip
    if sum(shown_name(owner, each) is not None for each in store.names()) >= most:
        raise ApiError(403, f"{most} sessions are kept at most: delete some first", code="too_many_sessions")


class _Answer:
    """An answer about a session under way."""

    def __init__(self, name: str, serving: Serving) -> None:
        self.name, self.serving = name, serving
        self.text = ""
        self.done: Done | None = None

    def take(self, event: Event) -> None:
        """Take what the engine tells."""
        if isinstance(event, Delta):
            self.text += event.text
        elif isinstance(event, Done):
            self.done = event

    async def events(self, events: answering.Numbered) -> AsyncIterator[ServerSentEvent]:
        """Make the stream's events of the engine's: pieces of text, then the whole."""
        async for _, event in events:
            self.take(event)
            if isinstance(event, Progress):
                yield answering.read_so_far(event)
            elif isinstance(event, Delta) and event.text:
                yield answering.data({"object": "session.answer.delta", "delta": event.text})
        yield answering.data(self.told())
        yield answering.ended()

    def told(self) -> dict[str, Any]:
        """Return the whole answer."""
        assert self.done is not None, "it has not ended"
        return {
            "object": "session.answer",
            "session": self.name,
            "model": self.serving.name,
            "answer": self.text,
            "citations": wording.citations_of(self.done.citations),
            "unsourced": self.done.unsourced,
            "notes": list(self.done.notes),
            "finish_reason": self.done.finish_reason,
            "usage": wording.usage_of([self.done.usage]),
        }
