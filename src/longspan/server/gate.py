"""Who comes in: keys, hosts, sizes and numbers, looked at before a body is read.

Plain ASGI around the application, so that a refused request costs nothing. Keys are compared in constant time. It does
not know what is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longspan.server.answering import told
from longspan.server.counters import Counters
from longspan.server.refusals import ApiError
from longspan.server.serving import ServerOptions

OPEN = ("/health", "/ready", "/", "/docs", "/openapi.json", "/static/")
"""Paths that need no key: a page asks for it itself. A path that ends in / stands for what lies below it."""
_UNCOUNTED = ("/health", "/ready", "/metrics")
_log = logging.getLogger("longspan.server.access")


class Keys:
    """The keys that are let in; none: everybody is."""

    def __init__(self, keys: Sequence[str], owners: Sequence[str] = ()) -> None:
        """Take the keys, of which only digests are held, and the names of their owners (none, or empty: the key's)."""
        self._digests = [_digest(key.encode()) for key in keys]
        # Not by their numbers: a line added to the file of keys must not give sessions to somebody else.
        named = owners or [""] * len(keys)
        self.owners = [name or f"k{digest.hex()[:12]}" for name, digest in zip(named, self._digests, strict=True)]

    def __bool__(self) -> bool:
        """Return whether a key is needed."""
        return bool(self._digests)

    def number(self, given: bytes) -> int | None:
        """Return which key it is, None for none of them; it takes as long for every key, known or not."""
        digest, found = _digest(given), None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """The application behind it sees only what may come in."""

    def __init__(self, app: ASGIApp, options: ServerOptions, counters: Counters) -> None:
        """Take the application, what the limits are, and where requests are counted."""
        self.app, self.options, self.counters = app, options, counters
        self.keys = Keys(options.keys, options.owners)
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is closed by the server
        counted = scope["path"] not in _UNCOUNTED
        began, status = time.perf_counter(), 0
        body = _Body(scope, receive, self.options)

        async def sending(message: Message) -> None:
            nonlocal status
            if body.refusal is not None and not status:
                return  # the application took it for a body that can't be parsed
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_SAFE]}
            await send(message)

        self.inside += counted
        try:
            self._check(scope, counted)
            body.check_length()
            await self.app(scope, body.receive, sending)
        except ApiError as error:
            body.refusal = error
        except asyncio.CancelledError:  # whoever listens is leaving, and the time of grace is over
            body.refusal = ApiError(503, "the server is shutting down: ask again later", headers={"Retry-After": "5"})
        except ConnectionAbortedError:
            pass  # the client reads nothing: the response ends unfinished, and the connection with it
        except Exception as error:
            # What the application did not expect it has told the client and the log already, and raises once more.
            if not status:
                await told(error).response()(scope, receive, sending)
        finally:
            refusal, body.refusal = body.refusal, None
            if refusal is not None and not status:
                await refusal.response()(scope, receive, sending)
            self.inside -= counted
            self.counters.count(scope, status, time.perf_counter() - began)
            if counted:
                user = scope.get("longspan.user", "")
                _log.info("%s %s %s%s", scope["method"], _shown(scope["path"]), status, f" user={user}" if user else "")

    def _check(self, scope: Scope, counted: bool) -> None:
        options, headers = self.options, scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > options.header_bytes:
            raise ApiError(431, f"the headers are longer than {options.header_bytes:,} bytes: send fewer")
        _check_origin(headers, options.hosts)
        if self.keys and not _is_open(scope["path"]):
            given = next((value for name, value in headers if name == b"authorization"), b"")
            kind, _, key = given.partition(b" ")
            number = self.keys.number(key.strip()) if kind.lower() == b"bearer" else None
            if number is None:
                raise ApiError(
                    401, "a valid API key is needed: send 'Authorization: Bearer KEY'", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            scope["longspan.key"], scope["longspan.owner"] = str(number), self.keys.owners[number]
        if counted and self.inside > options.requests:
            raise ApiError(429, f"{options.requests} requests are under way: ask again later", code="too_many_requests",
                           headers={"Retry-After": "1"})  # fmt: skip


_SAFE = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer")]


def _is_open(path: str) -> bool:
    return any(path == each or (each.endswith("/") and each != "/" and path.startswith(each)) for each in OPEN)


def _check_origin(headers: Sequence[tuple[bytes, bytes]], hosts: Sequence[str]) -> None:
    """Refuse pages of other sites: a browser on this machine reaches a local server, whoever wrote the page."""
    found = {name: value.decode("latin-1") for name, value in headers if name in (b"host", b"origin")}
    host = found.get(b"host", "")
    if hosts and _name(host).lower() not in hosts:
        raise ApiError(421, f"this server is not {host[:100]!r}: use {hosts[0]}", code="wrong_host")
    origin = found.get(b"origin")
    if origin is not None and _place(origin) != host:
        raise ApiError(403, "pages of other sites may not ask this server", code="wrong_origin")


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """Return a `Host` header's name without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


def _shown(path: str) -> str:
    """Return a path for the log, where it is one line."""
    return ascii(path)[1:-1][:200]


class _Body:
    """A body that is counted as it comes, and given up when nothing comes."""

    def __init__(self, scope: Scope, receive: Receive, options: ServerOptions) -> None:
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        upload = kind.lower().startswith(b"multipart/form-data")
        self.most = options.upload_bytes if upload else options.body_bytes
        self.seconds, self._scope, self._receive = options.body_seconds, scope, receive
        self.came, self.whole = 0, False
        self.refusal: ApiError | None = None
        """Why no more of it is read."""

    def check_length(self) -> None:
        """Refuse a body that says it is too long, before any of it is read."""
        told = next((value for name, value in self._scope["headers"] if name == b"content-length"), b"0")
        if told.isdigit() and int(told) > self.most:
            raise self._too_long()

    async def receive(self) -> Message:
        """Return the next part, or what comes after the body: that the client has gone."""
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self.seconds)
        except TimeoutError:
            self.refusal = ApiError(
                408, f"nothing of the body came for {self.seconds:g} s", headers={"Connection": "close"}
            )
            raise self.refusal from None
        if message["type"] == "http.request":
            self.came += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.came > self.most:
                self.refusal = self._too_long()
                raise self.refusal
        return message

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self.most:,} bytes: send less, or upload documents as files",
                        code="request_too_large", headers={"Connection": "close"})  # fmt: skip
