"""A small HTTP server that speaks the OpenAI protocol on 127.0.0.1; a test says what it answers and how it fails."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Failure:
    """What is answered once in place of an answer."""

    status: int = 500
    error: Any = "it broke"
    """The error's message, or its object."""
    headers: dict[str, str] = field(default_factory=dict)
    how: str = "status"
    """`drop`: the connection ends at once; `half`: an answer ends in its middle; `event`: the stream tells an error."""


@dataclass
class Request:
    """What was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """All of the text that the model reads."""
        if "prompt" in self.body:
            return str(self.body["prompt"])
        return "".join(message["content"] for message in self.body["messages"])


class Server:
    """A context manager around a server with a thread a connection."""

    def __init__(
        self, answer: Callable[[str], str] = lambda _: "seven", *, models: tuple[str, ...] = ("scripted",),
        key: str = "", streams: bool = True, counts: bool = True, window: int | None = None,
        unknown: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Say what the endpoint does.

        Args:
            answer: the model: from what it reads to what it answers.
            models: those that it lists; empty: it lists none.
            key: that it wants.
            streams: whether it streams, or answers in one piece.
            counts: whether it tells the usage.
            window: words that a prompt may have.
            unknown: fields of a request that it refuses.
        """
        self.answer, self.models, self.key, self.streams, self.counts = answer, models, key, streams, counts
        self.window, self.unknown = window, unknown
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        """Taken from the front, one a request."""
        self.gate: Callable[[], None] = lambda: None
        """Called before each answer: it may wait."""
        self.lock = threading.Lock()

    def __enter__(self) -> Server:
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._http = _Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away: some tests do."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner = self.server_of
        if self._refused():
            return
        if self.path != "/v1/models" or not owner.models:
            self._json(404, {"detail": "Not Found"})
        else:
            self._json(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in owner.models]})

    def do_POST(self) -> None:
        owner = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        with owner.lock:
            owner.requests.append(request)
            failure = owner.failures.pop(0) if owner.failures else None
        if self._refused():
            return
        if failure is not None:
            self._fail(failure)
        elif self.path not in ("/v1/chat/completions", "/v1/completions"):
            self._json(404, {"detail": "Not Found"})
        elif owner.models and body["model"] not in owner.models:
            self._json(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
        elif wrong := [name for name in owner.unknown if name in body]:
            told = f"Unsupported parameter: '{wrong[0]}' is not supported with this model."
            if wrong[0] == "max_tokens":
                told += " Use 'max_completion_tokens' instead."
            self._json(400, {"error": {"message": told, "code": "unsupported_parameter"}})
        elif owner.window is not None and len(request.prompt.split()) > owner.window:
            told = f"This model's maximum context length is {owner.window} tokens."
            self._json(400, {"error": {"message": told, "code": "context_length_exceeded"}})
        else:
            owner.gate()
            self._answer(request, owner.answer(request.prompt))

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _refused(self) -> bool:
        owner = self.server_of
        given = self.headers.get("authorization", "").removeprefix("Bearer ")
        if owner.key and given != owner.key:
            self._json(401, {"error": {"message": f"Incorrect API key provided: {given}.", "code": "invalid_api_key"}})
            return True
        return False

    def _fail(self, failure: Failure) -> None:
        if failure.how == "drop":
            self.close_connection = True
            self.connection.close()
        elif failure.how == "status":
            error = failure.error if isinstance(failure.error, dict) else {"message": failure.error}
            self._json(failure.status, {"error": error}, failure.headers)
        else:
            self._begin("text/event-stream")
            self._event({"choices": [{"delta": {"content": "sev"}, "finish_reason": None}]})
            if failure.how == "event":
                self._event({"error": {"message": failure.error, "code": failure.status}})
            self._end()

    def _answer(self, request: Request, text: str) -> None:
        chat, words = "messages" in request.body, text.split(" ")
        pieces = [word + " " * (i + 1 < len(words)) for i, word in enumerate(words)]
        told = len(request.prompt.split())
        usage = {"prompt_tokens": told, "completion_tokens": len(pieces), "total_tokens": told + len(pieces)}
        usage["prompt_tokens_details"] = {"cached_tokens": told // 2}
        counted = {"usage": usage} if self.server_of.counts else {}
        if not self.server_of.streams:
            whole = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            self._json(200, {"choices": [{**whole, "index": 0, "finish_reason": "stop"}], **counted})
            return
        self._begin("text/event-stream; charset=utf-8")
        self._send(b": keep alive\n\n")
        for piece in pieces:
            self._event({"choices": [{**({"delta": {"content": piece}} if chat else {"text": piece})}]})
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        self._event({"choices": [{**last, "finish_reason": "stop"}]})
        if counted and request.body.get("stream_options", {}).get("include_usage"):
            self._event({"choices": [], **counted})
        self._send(b"data: [DONE]\n\n")
        self._end()

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _event(self, value: object) -> None:
        self._send(f"data: {json.dumps(value)}\n\n".encode())

    def _send(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
