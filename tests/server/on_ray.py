"""Two replicas behind Ray Serve on this machine's CPU, checked; no test of the suite, which does not need ray.

PYTHONPATH=src:tests:deploy python tests/server/on_ray.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import ray
import ray_serve
import requests
from ray import serve

from tiny_llama import save_model

TEXT = "The code of the gate is 7315. Lise keeps the spare key. " * 20


class Client(requests.Session):
    """Asks the one address."""

    def request(self, method, url, **more):
        return super().request(method, f"http://127.0.0.1:8123{url}", timeout=60, **more)


def main() -> int:
    """Start both, ask, end one, and ask again."""
    folder = Path(tempfile.mkdtemp())
    save_model(folder / "tiny", max_position_embeddings=1024)
    os.environ.update(
        LONGSPAN_SESSIONS=str(folder / "sessions"), LONGSPAN_CACHE=str(folder / "cache"), LONGSPAN_THREADS="1",
        OMP_NUM_THREADS="1", RAY_DEDUP_LOGS="0", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    began = time.perf_counter()
    options = {"replicas": "2", "model": str(folder / "tiny"), "attention": "dense", "cpus": "0.5", "device": "cpu"}
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    serve.run(ray_serve.app(options), name="longspan")
    print(f"two replicas after {time.perf_counter() - began:.1f} s", flush=True)
    client = Client()
    where: dict[str, str] = {}
    for name in ("may", "june", "july", "august", "lease", "rules"):
        made = client.post("/v1/sessions", json={"name": name, "documents": [{"name": "d", "text": TEXT + name}]})
        assert made.status_code in (200, 201), made.text
        where[name] = made.headers["x-longspan-replica"]
        assert where[name] == ray_serve.home(name, ["replica_0", "replica_1"])
        for _ in range(2):
            told = client.post(
                f"/v1/sessions/{name}/ask", json={"question": "What is the code?", "max_tokens": 4, "remember": False}
            )
            assert told.status_code == 200 and told.headers["x-longspan-replica"] == where[name], told.text
    assert set(where.values()) == {"replica_0", "replica_1"}, where
    print(f"sessions lie on {where}", flush=True)
    rounds = [client.get("/health").headers["x-longspan-replica"] for _ in range(4)]
    assert rounds.count("replica_0") == rounds.count("replica_1") == 2, rounds
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "And?"}], "max_tokens": 4, "stream": True}
    with client.post("/v1/chat/completions", json=asked | {"session_id": "may"}, stream=True) as answer:
        lines = [line for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: ")]
        assert answer.headers["x-longspan-replica"] == where["may"] and lines[-1] == "data: [DONE]", lines
        assert json.loads(lines[0][6:])["object"] == "chat.completion.chunk"
    forked = client.post("/v1/sessions/may/fork", json={"name": "may-b"})
    assert forked.status_code in (200, 201), forked.text
    told = client.post(
        "/v1/sessions/may-b/ask", json={"question": "What is the code?", "max_tokens": 4, "remember": False}
    )
    assert told.status_code == 200, told.text
    first = client.post(
        "/v1/sessions/may/ask", json={"question": "What is the code?", "max_tokens": 4, "remember": False}
    ).json()
    assert client.get("/v1/sessions/nobody").status_code == 404
    # One replica is gone: Ray starts it again by its name, and it finds its sessions on disk.
    victim = where["may"]
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if victim in a["name"]]
    ray.kill(ray.get_actor(actors[0]["name"], actors[0]["namespace"]), no_restart=True)
    began, again = time.perf_counter(), None
    while time.perf_counter() - began < 90:
        again = client.post(
            "/v1/sessions/may/ask", json={"question": "What is the code?", "max_tokens": 4, "remember": False}
        )
        if again.status_code == 200:
            break
        time.sleep(1)
    assert again is not None and again.status_code == 200, again
    assert again.headers["x-longspan-replica"] == victim
    keys = [key for key in first if key in ("text", "answer")]
    assert keys and all(first[key] == again.json()[key] for key in keys), (first, again.json())
    print(f"{victim} was ended; its session answered alike {time.perf_counter() - began:.1f} s later", flush=True)
    serve.shutdown()
    ray.shutdown()
    print("PASS", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
