"""`/v1/sessions`: documents that are read once and asked often; each session is saved as soon as it changes.

Reading and answering are requests like any other; forking, saving and removing are done between two steps of the
engine, and wait for requests on that session. Whoever has a key sees every session.
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
from longspan.engine.serving import Delta, Done, Event, Progress, Request
from longspan.server import answering, uploads, wording
from longspan.server.fields import SessionId
from longspan.server.refusals import ApiError
from longspan.server.serving import Serving, key_of, note_user, serving_of
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
_Held = dict[str, Session]


@router.post("", status_code=201, summary="Make a session")
async def create(body: SessionCreate, http: HttpRequest, serving: Parts) -> SessionTold:
    """Make a session, and have it read documents where some are given."""
    texts = await anyio.to_thread.run_sync(uploads.texts, body.documents, serving.options.documents)

    def make(llm: LLM, held: _Held) -> None:
        _check_free(llm, held, body.name, serving.options.sessions)
        made = llm.session(body.name)
        llm.save(made)
        held[body.name] = made  # not before: one that can't be saved is not there

    await _done(serving, make, body.name)
    if texts:
        await _read(http, serving, body.name, texts)
    return await _told(serving, body.name)


@router.get("", summary="List sessions")
async def sessions(serving: Parts) -> SessionList:
    """List the sessions that are saved."""
    infos = await anyio.to_thread.run_sync(serving.scheduler.llm.store.infos)
    return SessionList(data=[of_info(info) for info in infos])


@router.get("/{name}", summary="Show a session")
async def show(name: Name, serving: Parts) -> SessionTold:
    """Tell what a session holds."""
    return await _told(serving, name)


@router.delete("/{name}", summary="Delete a session")
async def delete(name: Name, serving: Parts) -> Deleted:
    """Delete a session and its files; sessions forked from it stay."""

    def remove(llm: LLM, held: _Held) -> None:
        llm.store.existing(name)
        _let_go(held, name)
        llm.store.remove(name)

    await _done(serving, remove, name)
    return Deleted(id=name)


@router.post("/{name}/documents", summary="Have a session read documents")
async def append(name: Name, body: DocumentsAdd, http: HttpRequest, serving: Parts) -> SessionTold:
    """Have a session read documents given as text, or by a path below the server's folder of documents."""
    serving.check_session(name)
    texts = await anyio.to_thread.run_sync(uploads.texts, body.documents, serving.options.documents)
    await _read(http, serving, name, texts)
    return await _told(serving, name)


@router.post("/{name}/files", summary="Have a session read uploaded files")
async def upload(
    name: Name, http: HttpRequest, serving: Parts, files: Annotated[list[UploadFile], File(max_length=1000)]
) -> SessionTold:
    """Have a session read uploaded files: text, Markdown, source code, HTML, PDF, DOCX and others."""
    serving.check_session(name)
    texts = []
    for file in files:
        content = await file.read()
        texts.append(
            await anyio.to_thread.run_sync(
                uploads.uploaded, file.filename or "upload", content, serving.options.upload_bytes
            )
        )
    await _read(http, serving, name, texts)
    return await _told(serving, name)


@router.post("/{name}/ask", summary="Ask about a session's documents")
async def ask(name: Name, body: SessionAsk, http: HttpRequest, serving: Parts) -> Response:
    """Answer a question about a session's documents, with the passages that the answer rests on."""
    body.check_stream()
    note_user(http, body.user or body.safety_identifier)
    serving.check_session(name)
    most = serving.answer_tokens(body.max_tokens)
    handle = serving.submit(
        Request(
            messages=[{"role": "user", "content": body.question}],
            session=name,
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
async def fork(name: Name, body: SessionFork, serving: Parts) -> SessionTold:
    """Make a session that has read and been asked the same, and goes its own way; nothing is copied."""

    def work(llm: LLM, held: _Held) -> None:
        llm.store.existing(name)
        _check_free(llm, held, body.name, serving.options.sessions)
        source = held.get(name)
        made = llm.fork(name if source is None else source, body.name)
        llm.save(made)
        held[body.name] = made

    await _done(serving, work, name)
    return await _told(serving, body.name)


@router.post("/{name}/save", summary="Save a session")
async def save(name: Name, serving: Parts) -> SessionTold:
    """Save what is new in a session; it is done after every change anyway."""
    serving.check_session(name)

    def work(llm: LLM, held: _Held) -> None:
        if name in held:
            llm.save(held[name])

    await _done(serving, work, name)
    return await _told(serving, name)


@router.post("/{name}/restore", summary="Go back to an earlier commit")
async def restore(name: Name, body: SessionRestore, serving: Parts) -> SessionTold:
    """Go back to what a session was when it was saved before; what came after is forgotten for good."""

    def work(llm: LLM, held: _Held) -> None:
        llm.store.existing(name)
        _let_go(held, name)
        llm.store.restore(name, body.commit)

    await _done(serving, work, name)
    return await _told(serving, name)


# --- parts ---------------------------------------------------------------------------------------------------------


async def _done(serving: Serving, work: Callable[[LLM, _Held], _T], session: str | None) -> _T:
    """Return what is done on the engine's thread (ApiError: what it raised)."""
    try:
        return await asyncio.wrap_future(serving.scheduler.run(work, session))
    except Exception as error:
        raise answering.told(error) from error


async def _read(http: HttpRequest, serving: Serving, name: str, texts: Sequence[tuple[str, str]]) -> None:
    """Have a session read; where the client goes away, what was read by then stays and is saved."""
    handle = serving.submit(Request(documents=texts, session=name, makes_session=False, key=key_of(http)))
    await answering.all_events(http, [handle], lambda _, event: None)


async def _told(serving: Serving, name: str) -> SessionTold:
    """Return what is known of a session: from disk, and turns, whose answers do not wait for the disk, from memory."""

    def look() -> SessionTold:
        return of_info(serving.scheduler.llm.store.show(name))

    def turns(_: LLM, held: _Held) -> int | None:
        return len(held[name].turns) if name in held else None

    try:
        told = await anyio.to_thread.run_sync(look)
    except Exception as error:
        raise answering.told(error) from error
    in_memory = await _done(serving, turns, None)
    return told if in_memory is None else told.model_copy(update={"turns": in_memory})


def _check_free(llm: LLM, held: _Held, name: str, most: int) -> None:
    if name in held or llm.store.exists(name):
        raise ApiError(409, f"a session {name!r} is there already: choose another name, or delete it first",
                       param="name", code="session_exists")  # fmt: skip
    if len(llm.store.names()) >= most:
        raise ApiError(403, f"{most} sessions are kept at most: delete some first", code="too_many_sessions")


def _let_go(held: _Held, name: str) -> None:
    """Forget a session in memory, and give its pages back."""
    session = held.pop(name, None)
    if session is not None and session.memory is not None:
        session.memory.free()
        session.memory = None


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
            "notes": list(self.done.notes),
            "finish_reason": self.done.finish_reason,
            "usage": wording.usage_of([self.done.usage]),
        }
