"""Several Longspan servers behind one address, by Ray Serve: a session's requests go to the replica that holds it.

    pip install "longspan[server]" "ray[serve]"
    cd deploy && LONGSPAN_SESSIONS=/shared/sessions serve run ray_serve:app replicas=2 model=smollm2 attention=retrieval

Every replica is a whole server (`longspan serve`, in the process of a Ray actor), and a deployment of its own, so that
its name stays its own when Ray starts it again: it then restores its sessions from the shared folder as they are asked
for. Which replica a session belongs to follows from its name and the replicas' (rendezvous hashing, so that with
another number few sessions move). Requests that name none go round.

Options, `name=value`: replicas, gpus (of each; 0 by default), cpus, model, attention, device, keys (a file as for
`longspan serve --api-key-file`). All replicas must see one LONGSPAN_SESSIONS folder. It does not know what is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

_OF_PATH = re.compile(r"/v1/sessions/([^/]+)")
_MOST_BODY = 256 << 20
"""Bytes of a request; each replica has limits of its own below this."""
_KNOWN = {"replicas", "gpus", "cpus", "model", "attention", "device", "keys"}
Head = tuple[int, list[tuple[bytes, bytes]]]
"""Status and headers of an answer."""


def session_of(path: str, body: bytes) -> str | None:
    """Return the name of the session that a request is about; None: of none, or of all."""
    if found := _OF_PATH.match(path):
        return found[1]
    if not body.lstrip().startswith(b"{"):
        return None
    try:
        given = json.loads(body)
    except ValueError:
        return None  # a replica says what is wrong with it
    name = given.get("name") if path.rstrip("/") == "/v1/sessions" else given.get("session_id")
    return name if isinstance(name, str) else None


def home(session: str, replicas: Sequence[str]) -> str:
    """Return the replica that a session belongs to: of all names, hashed with the session's, the greatest."""
    return max(replicas, key=lambda name: hashlib.blake2b(f"{name}/{session}".encode(), digest_size=8).digest())


class Replica:
    """One server: answers what it is asked, piece by piece."""

    def __init__(self, model: str | None, attention: str | None, device: str, keys: str | None) -> None:
        """Load the model; `longspan serve` says what the options are."""
        from pathlib import Path

        from longspan import LLM
        from longspan.cli.serve import keys_of
        from longspan.engine.serving import Scheduler
        from longspan.server.app import create_app
        from longspan.server.serving import ServerOptions

        secrets, owners = keys_of(None if keys is None else Path(keys))
        self.llm = LLM(model, attention, device)
        self.llm.heads_or_none()
        self.asgi = create_app(Scheduler(self.llm), ServerOptions(keys=secrets, owners=owners))
        self._lifespan: asyncio.Task[None] | None = None
        self._leave, self._started = asyncio.Event(), asyncio.Event()

    async def answer(
        self, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> AsyncIterator[Head | bytes]:
        """Yield an answer's head, then its body in pieces; a caller who leaves ends the request."""
        await self._start()
        pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
        }  # fmt: skip
        left, given = asyncio.Event(), iter([body])

        async def receive() -> dict[str, Any]:
            for whole in given:
                return {"type": "http.request", "body": whole, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                pieces.put_nowait((message["status"], list(message.get("headers", []))))
            elif message.get("body"):
                pieces.put_nowait(message["body"])

        async def run() -> None:
            try:
                await self.asgi(scope, receive, send)
            finally:
                pieces.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await task
        finally:
            left.set()

    async def check_health(self) -> None:
        """Tell Ray that this replica must be started again, where its engine has ended."""
        if self._lifespan is not None and self._lifespan.done():
            raise RuntimeError("the engine of this replica has ended")

    async def close(self) -> None:
        """Save sessions and end (Ray calls it before it stops a replica)."""
        self._leave.set()
        if self._lifespan is not None:
            await self._lifespan

    __del__ = close  # as Ray Serve wants it: awaited before the actor ends

    async def _start(self) -> None:
        """Start the application's own life once, in the loop that answers."""
        if self._lifespan is None:
            self._lifespan = asyncio.create_task(self._live())
        await self._started.wait()

    async def _live(self) -> None:
        begun = False

        async def receive() -> dict[str, str]:
            nonlocal begun
            if not begun:
                begun = True
                return {"type": "lifespan.startup"}
            await self._leave.wait()
            return {"type": "lifespan.shutdown"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                self._started.set()

        await self.asgi({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)


class Front:
    """The one address: hands every request to a replica, and its answer back as it comes."""

    def __init__(self, **replicas: Any) -> None:
        """Take the replicas' handles, by name."""
        self.replicas = replicas
        self._round = itertools.cycle(replicas)

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        from starlette.responses import JSONResponse, StreamingResponse

        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > _MOST_BODY:
                told = f"the request is larger than {_MOST_BODY >> 20} MiB: send documents one by one"
                return JSONResponse({"error": {"message": told, "type": "invalid_request_error"}}, 413)
        path = request.url.path
        session = session_of(path, bytes(body))
        name = next(self._round) if session is None else home(session, list(self.replicas))
        headers = [(key, value) for key, value in request.headers.raw if key != b"transfer-encoding"]
        pieces = self._ask(name, request.method, path, request.url.query.encode(), headers, bytes(body))
        status, answered = await anext(pieces)
        if path.endswith("/fork") and status < 300:
            # Another replica may be the new session's home: it finds it on disk.
            made = session_of("/v1/sessions", bytes(body))
            async for _ in self._ask(name, "POST", f"/v1/sessions/{made}/save", b"", _bare(headers), b""):
                pass
        answer = StreamingResponse(pieces, status)
        answer.raw_headers = [(key, value) for key, value in answered if key != b"transfer-encoding"]
        answer.headers["x-longspan-replica"] = name
        return answer

    def _ask(self, name: str, *asked: Any) -> Any:
        return aiter(self.replicas[name].options(stream=True).answer.remote(*asked))


def _bare(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return headers without those that speak of a body."""
    return [(key, value) for key, value in headers if not key.startswith(b"content-")]


def app(options: dict[str, str]) -> Any:
    """Return the application for `serve run ray_serve:app name=value ...`.

    Raises:
        ValueError: an option that there is not.
    """
    from ray import serve

    if unknown := set(options) - _KNOWN:
        raise ValueError(f"unknown option {min(unknown)!r}: use {', '.join(sorted(_KNOWN))}")
    count = int(options.get("replicas", "2"))
    needs = {"num_cpus": float(options.get("cpus", "1")), "num_gpus": float(options.get("gpus", "0"))}
    replica = serve.deployment(Replica).options(
        num_replicas=1, ray_actor_options=needs, max_ongoing_requests=256, graceful_shutdown_timeout_s=60
    )
    given = options.get("model"), options.get("attention"), options.get("device", "auto"), options.get("keys")
    made = {f"replica_{i}": replica.options(name=f"replica_{i}").bind(*given) for i in range(count)}
    front = serve.deployment(Front).options(
        num_replicas=1, max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(**made)
