"""Proof of the server: load, leaks, fuzz, sockets that misbehave, kills; its result is a JSON file.

    python -m benchmarks.server_load --out benchmarks/results/server-cpu.json
    python -m benchmarks.server_load --only load --seconds 300 --out ...
    python -m benchmarks.server_load --only schema --schemathesis /path/to/schemathesis --out ...

A tiny model with random weights runs in a server of its own process; the clients share the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

import longspan
from benchmarks.server_clients import PATIENCE, Seen, Served, chat, many, odd_body

CHATS, INGESTS, INGESTED = 40, 10, 20_000
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/sessions", "/v1/sessions/a/ask",
         "/v1/sessions/a/documents", "/v1/sessions/a/fork")  # fmt: skip


def share(values: list[float], part: float) -> float | None:
    """Return a percentile in milliseconds."""
    found = sorted(values)
    return round(1e3 * found[min(len(found) - 1, int(part * len(found)))], 2) if found else None


def load(place: Path, seconds: float, *options: str) -> dict[str, Any]:
    """50 clients, chats and ingests: errors, leaks, and how much slower a chat's tokens come than on an idle server."""
    with Served(place, *options) as served:
        asyncio.run(many(served.url, 1, 1, 3, 500))  # whatever is made on first use
        idle = asyncio.run(many(served.url, 1, 0, 8, 0))
        before = served.holds()
        seen = asyncio.run(many(served.url, CHATS, INGESTS, seconds, INGESTED))
        time.sleep(3)
        after = served.holds()
        asyncio.run(many(served.url, CHATS, INGESTS, min(10, seconds), INGESTED))
        time.sleep(3)
        later, tracebacks = served.holds(), served.tracebacks()
    idle_p95, loaded_p95 = share(idle.between, 0.95), share(seen.between, 0.95)
    return {
        "options": list(options), "chats": CHATS, "ingests": INGESTS, "ingest_tokens": INGESTED, "seconds": seconds,
        "statuses": dict(seen.statuses), "tracebacks": tracebacks,
        "chat_tokens": seen.tokens, "ingested_tokens": seen.ingested,
        "first_token_ms": {"idle_p50": share(idle.first, 0.5), "p50": share(seen.first, 0.5),
                           "p95": share(seen.first, 0.95)},
        "between_tokens_ms": {"idle_p50": share(idle.between, 0.5), "idle_p95": idle_p95,
                              "p50": share(seen.between, 0.5), "p95": loaded_p95},
        "times_idle_p95": round(loaded_p95 / idle_p95, 1) if idle_p95 and loaded_p95 else None,
        "health_ms": {"p50": share(seen.health, 0.5), "p95": share(seen.health, 0.95), "max": share(seen.health, 1)},
        "held": {"before": before, "after": after, "after_more_of_it": later},
    }  # fmt: skip


def decode(place: Path) -> dict[str, Any]:
    """Tokens a second of 1, 4 and 16 chats at once: every token streamed with its probability, or all at the end."""
    length = 256

    async def whole(http: httpx2.AsyncClient, seen: Seen, question: str, tokens: int) -> None:
        body = {"model": "model", "messages": [{"role": "user", "content": question}], "max_tokens": tokens,
                "logit_bias": {"0": -100}}  # fmt: skip
        seen.tokens += (await http.post("/v1/chat/completions", json=body)).json()["usage"]["completion_tokens"]

    async def at_once(url: str, count: int, ask: Any) -> float:
        seen = Seen()
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            started = time.perf_counter()
            await asyncio.gather(*(ask(http, seen, f"What is the code of {i}?", length) for i in range(count)))
            return seen.tokens / (time.perf_counter() - started)

    found = {}
    with Served(place) as served:
        for name, ask in (("streamed", chat), ("at_the_end", whole)):
            asyncio.run(at_once(served.url, 16, ask))
            rates = {n: max(asyncio.run(at_once(served.url, n, ask)) for _ in range(2)) for n in (1, 4, 16)}
            found[name] = {"tokens_per_s": {str(n): round(rate, 1) for n, rate in rates.items()},
                           "times_one": round(rates[16] / rates[1], 2)}  # fmt: skip
    return found


def fuzz(place: Path, count: int, seed: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """Odd bodies, eight at once: no 5xx, no hang, no traceback; what an earlier run of another seed found is added."""
    drawn, statuses, slowest = random.Random(seed), Counter[str](), 0.0
    # Some ask for answers as long as the window, which would take all of the time.
    with Served(place, "--max-answer-tokens", "64") as served:

        async def some(http: httpx2.AsyncClient, bodies: list[tuple[str, bytes]]) -> None:
            nonlocal slowest
            for path, body in bodies:
                sent = time.perf_counter()
                answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})
                slowest = max(slowest, time.perf_counter() - sent)
                statuses[str(answer.status_code)] += 1
                if answer.status_code >= 500:
                    print(path, body[:300], answer.text[:300], flush=True)

        async def all_of_it() -> None:
            async with httpx2.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
                bodies = [(path, odd_body(path, drawn)) for path in drawn.choices(PATHS, k=count)]
                await asyncio.gather(*(some(http, bodies[i::8]) for i in range(8)))

        asyncio.run(all_of_it())
        healthy = httpx2.get(f"{served.url}/health").status_code == 200
        tracebacks = served.tracebacks()
    if before is not None and seed not in before["seeds"]:
        count, tracebacks = count + before["bodies"], tracebacks + before["tracebacks"]
        statuses.update(before["statuses"])
        slowest, healthy = max(slowest, before["slowest_s"]), healthy and before["healthy_after"]
    seeds = sorted({seed, *(before or {}).get("seeds", ())})
    return {"bodies": count, "seeds": seeds, "statuses": dict(sorted(statuses.items())),
            "slowest_s": round(slowest, 2), "tracebacks": tracebacks, "healthy_after": healthy}  # fmt: skip


def sockets(place: Path) -> dict[str, Any]:
    """Slow readers, half-closed and silent connections, a head of 1 MB: chats go on, and nothing is held afterwards."""
    with Served(place) as served:
        asyncio.run(many(served.url, 1, 0, 1, 0))
        before, address = served.holds(), ("127.0.0.1", served.port)
        body = json.dumps({"model": "model", "prompt": "x", "max_tokens": 20_000, "stream": True, "logprobs": 20,
                           "logit_bias": {"0": -100}}).encode()  # fmt: skip
        head = (f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n").encode()  # fmt: skip
        made = []
        for number in range(60):
            each = socket.create_connection(address)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            made.append(each)
            with contextlib.suppress(OSError):
                if number < 8:
                    each.sendall(head + body)  # reads nothing of its answer
                elif number < 24:
                    each.sendall(head + body)
                    each.shutdown(socket.SHUT_WR)
                elif number < 40:
                    each.sendall(head[: number * 3])  # never comes to the point
                elif number < 56:
                    each.sendall(head + body[:10])
                else:
                    each.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 1_000_000 + b"\r\n\r\n")
        during = asyncio.run(many(served.url, 4, 0, 5, 0))
        memory = served.holds()["megabytes"]
        # Slow readers are given up after 30 s without a byte, half a body as well, a head after 10.
        for _ in range(90):
            held = served.holds()
            if held["handles"] <= before["handles"] + 1 and not held["writing"]:
                break
            time.sleep(1)
        for each in made:
            each.close()
        return {"connections": 60, "chats_meanwhile": dict(during.statuses), "megabytes_meanwhile": memory,
                "held": {"before": before, "after": held}, "tracebacks": served.tracebacks()}  # fmt: skip


def kills(place: Path, count: int) -> dict[str, Any]:
    """SIGKILL under load, restart, and look for what had been acknowledged."""
    lost, acknowledged = 0, 0
    known: dict[str, int] = {}
    for number in range(count):
        with Served(place) as served:
            with httpx2.Client(base_url=served.url, timeout=60) as http:
                for name, documents in known.items():
                    answer = http.get(f"/v1/sessions/{name}")
                    held = len(answer.json()["documents"]) if answer.status_code == 200 else 0
                    asked = http.post(f"/v1/sessions/{name}/ask", json={"question": "?", "max_tokens": 2})
                    lost += held < documents or asked.status_code != 200
            name = f"kill-{number}"

            def work(name: str = name, url: str = served.url) -> None:
                with contextlib.suppress(httpx2.HTTPError), httpx2.Client(base_url=url, timeout=60) as http:
                    http.post("/v1/sessions", json={"name": name}).raise_for_status()
                    known[name] = 0
                    while True:
                        text = f"Document {known[name]}. " + "The gate is shut. " * 50
                        body = {"documents": [{"text": text}]}
                        http.post(f"/v1/sessions/{name}/documents", json=body).raise_for_status()
                        known[name] += 1

            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(1 + random.Random(number).random() * 2)
            served.process.send_signal(signal.SIGKILL)
            served.process.wait()
            thread.join()
            acknowledged = sum(known.values())
    return {"kills": count, "sessions": len(known), "documents_acknowledged": acknowledged, "lost": lost}


def schema(place: Path, tool: str) -> dict[str, Any]:
    """Run schemathesis over the OpenAPI description: no answer may be a 5xx."""
    with Served(place, "--max-answer-tokens", "32") as served:
        done = subprocess.run(
            [tool, "run", f"{served.url}/openapi.json", "--checks", "not_a_server_error", "--max-examples", "50",
             "--seed", "1", "--workers", "2", "--request-timeout", "30"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        tracebacks = served.tracebacks()
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    print(text[-3000:], flush=True)
    told = [line.strip() for line in text.splitlines() if re.search(r"generated|Operations:|failure", line)]
    return {"exit_code": done.returncode, "tracebacks": tracebacks, "told": told}


def main() -> None:
    """Run the parts that were asked for, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, between commas: load, in_time, decode, fuzz, sockets, kill, schema")
    parser.add_argument("--seconds", type=float, default=300.0, help="of load")
    parser.add_argument("--token-ms", type=float, default=4.0, help="of in_time, which is load with that option")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of odd bodies; runs of other seeds add up in one file")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--out", help="a JSON file; parts that it holds already and are not run again stay")
    given = parser.parse_args()
    parts: dict[str, Callable[[Path], Any]] = {
        "load": lambda place: load(place, given.seconds),
        "in_time": lambda place: load(place, given.seconds, "--token-ms", str(given.token_ms)),
        "decode": decode,
        "fuzz": lambda place: fuzz(place, given.bodies, given.seed, result.get("fuzz")),
        "sockets": sockets,
        "kill": lambda place: kills(place, given.kills),
        "schema": lambda place: schema(place, given.schemathesis),
    }
    out = Path(given.out) if given.out else None
    result: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    result |= {
        "device": f"{os.cpu_count()} CPU cores, shared by server and clients",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "longspan": longspan.__version__,
        "command": "python -m benchmarks.server_load",
    }
    for part in given.only.split(",") if given.only else list(parts):
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            result[part] = parts[part](Path(place))
        print(f"{part}: {time.perf_counter() - started:.1f} s: {json.dumps(result[part])}", flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
