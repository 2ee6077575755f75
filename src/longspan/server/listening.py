"""From an application to a process that listens: a socket, uvicorn, signals, connections that do not come to the point.

It does not know endpoints or models.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from longspan.errors import LongspanError, UsageError

_HEADER_SECONDS = 10.0
"""In which a new connection must have sent the head of a request."""
_HEADER_BYTES = 64 * 2**10
"""Of a request's head that are held at most."""
_CONNECTIONS = 2048
_BACKLOG = 512


class ListenError(LongspanError):
    """The address can't be listened on."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """Return a socket on an address, not listening yet: before a model is loaded, a taken port is told.

    Raises:
        ListenError: the port is taken, or not for this user.
        UsageError: no such host or port.
    """
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is no port: give one from 1 to 65535 (0: any that is free)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address of this machine: try 127.0.0.1") from error
    # asyncio sends small writes at once (TCP_NODELAY) only where the protocol is told: else an answer takes 40 ms more.
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise ListenError(f"port {port} of {host} is taken: stop what listens there, or use --port") from error
        if error.errno == errno.EACCES:
            raise ListenError(f"port {port} is not for this user: use one above 1023") from error
        raise ListenError(f"can't listen on {host}:{port}: {error.strerror or error}") from error
    return made


def url_of(made: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(app: ASGIApp, made: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGTERM or SIGINT; arguments as for `server`."""
    server(app, grace=grace, ready=ready).run(sockets=[made])


def server(app: ASGIApp, *, grace: float, ready: Callable[[], None]) -> uvicorn.Server:
    """Return what serves an application; asked to stop, it takes no request any more, and those under way may finish.

    Args:
        app: the application.
        grace: seconds in which they may; a second signal ends them at once.
        ready: called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,  # h11: it bounds heads
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        backlog=_BACKLOG,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, round(grace)),
        proxy_headers=False,
    )
    return _Server(config, ready)


class _Server(uvicorn.Server):
    """uvicorn, which tells when it is ready, and leaves quietly when it is asked to."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            self._tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave; asked again, end what is under way at once, but save in any case, unlike uvicorn's own."""
        if self.should_exit and self._loop is not None:
            for task in list(self.server_state.tasks):
                self._loop.call_soon_threadsafe(task.cancel)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals; unlike uvicorn's own this does not raise them again when all is saved and done."""

        def leave(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        if threading.current_thread() is not threading.main_thread():  # which alone may take signals
            yield
            return
        before = {each: signal.signal(each, leave) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


class _Protocol(H11Protocol):
    """A connection, which is closed if it does not come to the point or if there are too many."""

    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request's head."""
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
            return
        self._due = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head that has begun, the first or a later one, must end in time."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._due is None:
            self._due = self.loop.call_later(_HEADER_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        self._due = None
        answered = self.cycle is None or self.cycle.response_complete
        if self.conn.their_state is h11.IDLE and answered and not self.transport.is_closing():
            self.transport.close()
