"""From an engine's events to a response: whole or as a stream, and given up as soon as the client has gone.

A handler that is no stream is not told of a client that goes away; so somebody waits for that beside it, and the work
is cancelled, also while a document is read. A client that reads slowly holds up nobody: its events wait, an answer is
bounded, and after some time without a byte read the connection is given up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

import anyio
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus, SendTimeoutError

from longspan.engine.serving import Done, Event, Handle, Progress
from longspan.server.refusals import ApiError, api_error

T = TypeVar("T")
Numbered = AsyncIterator[tuple[int, Event]]
"""Events, each with the number of the request that it is about."""
_PING = 15
"""Seconds between the comments that keep proxies from closing a quiet stream."""
_GONE = 499
_log = logging.getLogger("longspan.server")

# At a shutdown answers may finish within the time of grace; the library would cut them at once.
AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]


async def while_connected(request: HttpRequest, work: Callable[[], Awaitable[T]], handles: Iterable[Handle]) -> T:
    """Return what `work` returns; if the client goes away first, cancel the requests (ApiError, which nobody reads)."""
    result: list[T] = []
    failure: list[Exception] = []
    gone = False
    handles = list(handles)

    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal gone
            while (await request.receive())["type"] != "http.disconnect":
                pass
            gone = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result.append(await work())
        except Exception as error:
            failure.append(error)
        finally:
            if not result:
                for handle in handles:
                    handle.cancel()
        group.cancel_scope.cancel()
    if failure:
        raise told(failure[0]) from failure[0]
    if gone or not result:
        raise ApiError(_GONE, "the client closed the connection", code="cancelled")
    return result[0]


async def all_events(request: HttpRequest, handles: Iterable[Handle], take: Callable[[int, Event], None]) -> None:
    """Have `take` see every event of every request, with the request's number; errors as `ApiError`."""
    handles = list(handles)

    async def work() -> bool:
        async for number, event in _events(handles):
            take(number, event)
        return True

    await while_connected(request, work, handles)


async def stream(
    request: HttpRequest, handles: Iterable[Handle], made: Callable[[Numbered], AsyncIterator[ServerSentEvent]],
    seconds: float,
) -> EventSourceResponse:  # fmt: skip
    """Return a response that streams.

    What the engine refuses is refused with a status, since the response begins with the first event.

    Args:
        request: whose client is watched.
        handles: of the engine's requests, one after the other.
        made: makes of the engine's events, each with its request's number, what is sent.
        seconds: in which a client that reads nothing must read something.
    """
    handles = list(handles)
    coming = _events(handles)

    async def first() -> tuple[int, Event] | None:
        return await anext(coming, None)

    begun = await while_connected(request, first, handles)

    async def events() -> Numbered:
        if begun is not None:
            yield begun
        async for each in coming:
            yield each

    async def sent() -> AsyncIterator[ServerSentEvent]:
        try:
            async for each in made(events()):
                yield each
        except Exception as error:
            yield data(told(error).body())

    made_of = _Stream(sent(), ping=_PING, sep="\n", send_timeout=seconds, headers={"X-Accel-Buffering": "no"})
    made_of.handles = handles
    return made_of


async def _events(handles: Iterable[Handle]) -> Numbered:
    for number, handle in enumerate(handles):
        async for event in handle:
            if isinstance(event, Done) and event.finish_reason == "cancelled":
                # Whoever asked has not cancelled it, or nobody would be reading.
                raise ApiError(503, "the server is shutting down: ask again later", headers={"Retry-After": "5"})
            yield number, event


class _Stream(EventSourceResponse):
    """A stream whose client may stop reading: that is the end of it, and no error of ours."""

    handles: Iterable[Handle] = ()
    """Cancelled at its end, also where the client had gone before anything was sent."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            _log.info("a client read nothing of its stream for %s s: given up", self.send_timeout)
            raise ConnectionAbortedError("the client reads nothing") from None
        finally:
            for handle in self.handles:
                handle.cancel()


def data(value: Any, event: str | None = None) -> ServerSentEvent:
    """Return an event of JSON."""
    return ServerSentEvent(json.dumps(value, ensure_ascii=False, separators=(",", ":")), event=event, sep="\n")


def ended() -> ServerSentEvent:
    """Return the event by which OpenAI's streams end."""
    return ServerSentEvent("[DONE]", sep="\n")


def read_so_far(event: Progress) -> ServerSentEvent:
    """Return a comment that tells how far reading is: clients that know nothing of it skip comments."""
    return ServerSentEvent(comment=f"read {event.read} of {event.total} tokens", sep="\n")


def told(error: Exception) -> ApiError:
    """Return an error as the client is told of it; those that we did not expect go into the log."""
    found = api_error(error)
    if found.status >= 500:
        _log.error("%s", found, exc_info=error if found.code == "internal_error" else None)
    return found


def whole(value: Any) -> JSONResponse:
    """Return a JSON response."""
    return JSONResponse(value)
