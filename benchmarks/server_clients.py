"""A server as a process of its own with a tiny model, and the clients that ask it.

It does not know what is to be proved (`server_load.py`): it starts, asks, counts and measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil

TESTS = Path(__file__).resolve().parent.parent / "tests"
WINDOW = 32_768
ATTENTION = "streaming:window=1020,sinks=4"
"""Whose time to read grows with the text: what is measured is who waits for whom, not attention."""
MODEL = "model"
"""The model's name: that of its folder."""
PIECE = "The code of the tower in street {0} is {1}. Nobody had asked for the lantern of house {2}. "
PATIENCE = httpx2.Timeout(300)


class Served:
    """A context manager around a running server."""

    def __init__(self, place: Path, *options: str) -> None:
        """Take a folder for model, sessions and log, and options of `longspan serve`."""
        self.place, self.options = place, options
        self.model = place / MODEL
        if not self.model.exists():
            sys.path.insert(0, str(TESTS))
            from tiny_llama import save_model

            save_model(self.model, max_position_embeddings=WINDOW)

    def __enter__(self) -> Served:
        """Start it, and wait until it is ready."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        places = {"LONGSPAN_SESSIONS": str(self.place / "sessions"), "LONGSPAN_CACHE": str(self.place / "cache")}
        self.log = self.place / "log.txt"
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longspan.cli", "serve", "--model", str(self.model), "--port", str(self.port),
                 "--attention", ATTENTION, *self.options],
                env=os.environ | places | {"LONGSPAN_THREADS": "1", "OMP_NUM_THREADS": "1"}, stderr=log,
            )  # fmt: skip
        for _ in range(1800):
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-2000:]
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        self.seen = psutil.Process(self.process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it; after a while by force."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def holds(self) -> dict[str, float]:
        """Return what could leak: threads, file handles, memory, pages, requests."""
        text = httpx2.get(f"{self.url}/metrics").text
        values = {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if not line.startswith("#")
        }
        pages = sum(value for name, value in values.items() if name.startswith("longspan_pages{"))
        return {
            "threads": self.seen.num_threads(),
            "handles": self.seen.num_fds(),
            "megabytes": round(self.seen.memory_info().rss / 1e6),
            "pages": pages,
            "cached_contexts": values["longspan_cached_contexts"],
            "sessions_in_memory": values["longspan_sessions"],
            "waiting": values["longspan_waiting"],
            "reading": values["longspan_reading"],
            "writing": values["longspan_writing"],
        }

    def tracebacks(self) -> int:
        """Return how many tracebacks the log holds."""
        return self.log.read_text(encoding="utf-8").count("Traceback")


@dataclass
class Seen:
    """What clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    between: list[float] = field(default_factory=list)
    """Seconds between two tokens of a chat."""
    first: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    tokens: int = 0
    ingested: int = 0


def text_of(drawn: random.Random, tokens: int) -> str:
    """Return a text of about so many of the tiny model's tokens (some 58 a piece)."""
    return "".join(PIECE.format(drawn.randrange(999), drawn.randrange(9999), i) for i in range(tokens // 58))


async def chat(http: httpx2.AsyncClient, seen: Seen, question: str, tokens: int = 48) -> None:
    """Ask once, as a stream, and note when each token came."""
    body = {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True,
        "logit_bias": {"0": -100}, "logprobs": True,
    }  # fmt: skip
    sent = last = time.perf_counter()
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            seen.statuses[str(answer.status_code)] += 1
            await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))
            return
        count = 0
        async for line in answer.aiter_lines():
            if '"error"' in line:
                seen.statuses["error in a stream"] += 1
            if '"logprobs":{' not in line:
                continue
            now = time.perf_counter()
            (seen.between if count else seen.first).append(now - (last if count else sent))
            last, count = now, count + 1
    seen.tokens += count
    seen.statuses["200" if count == tokens else "cut"] += 1


async def ingest(http: httpx2.AsyncClient, seen: Seen, name: str, drawn: random.Random, tokens: int) -> None:
    """Have a new session read a document, ask it once, and delete it."""
    told: list[httpx2.Response] = []
    body = {"name": name, "documents": [{"text": text_of(drawn, tokens)}]}
    told.append(await http.post("/v1/sessions", json=body))
    if told[0].status_code == 201:
        seen.ingested += sum(each["tokens"] for each in told[0].json()["documents"])
        ask = {"question": "What is the code?", "max_tokens": 8}
        told.append(await http.post(f"/v1/sessions/{name}/ask", json=ask))
    gone = await http.delete(f"/v1/sessions/{name}")
    told += [gone] if told[0].status_code == 201 else []
    for answer in told:
        seen.statuses[str(answer.status_code)] += 1
    if told[-1].status_code == 429:
        await asyncio.sleep(float(told[-1].headers.get("Retry-After", 1)))


async def health(http: httpx2.AsyncClient, seen: Seen, until: float) -> None:
    """Ask for health ten times a second."""
    while time.perf_counter() < until:
        sent = time.perf_counter()
        answer = await http.get("/health")
        assert answer.status_code == 200, answer.text
        seen.health.append(time.perf_counter() - sent)
        await asyncio.sleep(0.1)


async def many(url: str, chats: int, ingests: int, seconds: float, tokens: int) -> Seen:
    """Have so many clients chat and ingest, each again and again, for so long."""
    seen, until = Seen(), time.perf_counter() + seconds

    async def chatting(http: httpx2.AsyncClient, number: int) -> None:
        drawn = random.Random(number)
        while time.perf_counter() < until:
            try:
                await chat(http, seen, f"What is the code of tower {drawn.randrange(999)}?")
            except httpx2.HTTPError as error:
                seen.statuses[type(error).__name__] += 1

    async def ingesting(http: httpx2.AsyncClient, number: int) -> None:
        drawn, count = random.Random(1000 + number), 0
        while time.perf_counter() < until:
            try:
                await ingest(http, seen, f"load-{number}-{count}", drawn, tokens)
            except httpx2.HTTPError as error:
                seen.statuses[type(error).__name__] += 1
            count += 1

    limits = httpx2.Limits(max_connections=200)
    async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
        work = [chatting(http, i) for i in range(chats)] + [ingesting(http, i) for i in range(ingests)]
        await asyncio.gather(*work, health(http, seen, until))
    return seen


_OF_ALL = "model temperature stop n logit_bias stream "
_FIELDS = {
    "chat": _OF_ALL + "messages max_tokens tools tool_choice response_format logprobs",
    "completions": _OF_ALL + "prompt max_tokens logprobs",
    "responses": "model input temperature stream",
    "sessions": "name documents",
    "ask": "question max_tokens stop stream",
    "documents": "documents",
    "fork": "name",
}


def odd_body(path: str, drawn: random.Random) -> bytes:
    """Return a body for an address that is wrong in some way, or right by chance."""
    value: Any = {
        "model": drawn.choice([MODEL, MODEL, "other", 1]),
        "messages": drawn.choice([[{"role": "user", "content": "x"}], [], "x", [{"role": "tool"}], [None], {}]),
        "prompt": drawn.choice(["x", [1, 2], [[1], [2]], [], [[]], ["x", 1], -1, [10**9], "\x00", "\ud800"]),
        "input": drawn.choice(["x", [], [{"role": "user", "content": "y"}], 5, None]),
        "question": drawn.choice(["x", "", None, 3]),
        "name": drawn.choice(["a", "..", "/etc", "", "x" * 200, None, 3]),
        "max_tokens": drawn.choice([1, 2, 0, -1, 1.5, "1", 10**30, None]),
        "temperature": drawn.choice([0, 1, -1, 99, "hot", float("nan"), float("inf"), None]),
        "stop": drawn.choice([None, "a", [], [""], ["a"] * 99, 3]),
        "n": drawn.choice([1, 2, 0, 99999, None]),
        "tools": drawn.choice([None, [], [{}], [{"type": "function", "function": {"name": "f"}}], "f"]),
        "tool_choice": drawn.choice([None, "required", "auto", {"type": "function", "function": {"name": "g"}}]),
        "response_format": drawn.choice([None, {"type": "json_schema"}, {"type": "json_object"}, {"type": 1},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/a", "allOf": [3]}}}]),
        "logit_bias": drawn.choice([None, {"1": 5}, {"x": 1}, {"-1": 1}, {"99999999": 1}, []]),
        "logprobs": drawn.choice([None, True, 3, 99, "x"]),
        "stream": drawn.choice([None, True, False, "yes"]),
        "documents": drawn.choice([None, [{"text": "x"}], [{"path": "../../etc/passwd"}], [{}], "x"]),
    }  # fmt: skip
    kind = "chat" if "/chat/" in path else path.rpartition("/")[2]
    fields, needed = _FIELDS[kind].split(), ("model", "messages", "prompt", "input", "question")
    if drawn.random() < 0.1:
        fields = list(value)
    kept = {key: each for key, each in value.items() if key in fields and (key in needed or drawn.random() < 0.35)}
    if drawn.random() < 0.5:  # mostly right, so that it gets further
        right: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "prompt": "x",
                                 "input": "x", "question": "x", "max_tokens": 2}  # fmt: skip
        kept |= {key: right[key] for key in kept if key in right and drawn.random() < 0.8}
    data = json.dumps(kept).encode()
    for _ in range(drawn.choice([0, 0, 0, 1, 3])):
        at = drawn.randrange(len(data))
        data = data[:at] + bytes([drawn.randrange(256)]) + data[at + drawn.choice([0, 1, 5]) :]
    return drawn.choice([data, data, data, data[: drawn.randrange(len(data))], b"[" * drawn.randrange(2000)])
