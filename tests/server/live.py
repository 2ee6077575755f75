"""A server that listens on a free port of this machine, in a thread of its own."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx2
import openai

from longspan.engine.serving import Limits, Scheduler
from longspan.server import listening
from longspan.server.app import create_app
from longspan.server.serving import ServerOptions


class Live:
    """A context manager around a running server."""

    def __init__(
        self, llm: Any, options: ServerOptions | None = None, limits: Limits | None = None, *, grace: float = 5
    ) -> None:
        self.llm, self.grace = llm, grace
        self.scheduler = Scheduler(llm, limits=limits)
        self.app = create_app(self.scheduler, options, grace=grace)
        self.key = options.keys[0] if options and options.keys else "none"

    def __enter__(self) -> Live:
        self.socket = listening.bound("127.0.0.1", 0)
        self.url = listening.url_of(self.socket)
        up = threading.Event()
        self.server: Any = listening.server(self.app, grace=self.grace, ready=up.set)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self._thread.start()
        assert up.wait(20), "the server did not start"
        self.http = httpx2.Client(base_url=self.url, timeout=30, headers={"Authorization": f"Bearer {self.key}"})
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=30)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"] if self.key else ""
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.socket.getsockname()[:2]
        return host, port

    def idle(self, seconds: float = 10.0) -> bool:
        """Wait until nothing is under way; return whether that came true."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            now = self.scheduler.metrics()
            if not (now.waiting_now or now.reading_now or now.writing_now):
                return True
            time.sleep(0.02)
        return False
