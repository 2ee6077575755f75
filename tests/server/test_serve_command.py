"""`longspan serve`: refused early and in one line; killed under load, its sessions are there."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from live import Live

from longspan import LLM, cli
from longspan.sessions.store import SessionStore

TEXT = "The code of the gate is 7315. Lise keeps the spare key. " * 3


def run(capsys, *arguments):
    code = cli.run(["serve", *arguments])
    return code, capsys.readouterr().err.strip()


def test_it_is_refused_in_a_line_before_a_model_is_loaded(capsys, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, told, expected in (
            (["--host", "0.0.0.0"], "--insecure", 2),
            (["--port", port], f"port {port} of 127.0.0.1 is taken", 1),
            (["--port", "70000"], "is no port", 2),
            (["--host", "no.such.host.invalid", "--insecure"], "is no address", 2),
            (["--api-key-file", str(keys)], "holds no key", 2),
            (["--api-key-file", str(tmp_path / "none")], "can't be read", 2),
            (["--documents", str(tmp_path / "none")], "is no folder", 2),
            (["--max-queue", "0"], "at least 1", 2),
            (["--max-body", "much"], "much", 2),
            (["--token-ms", "0"], "above 0", 2),
            (["--session-ttl", "soon"], "write 90s", 2),
            (["--session-memory", "much"], "much", 2),
        ):
            code, err = run(capsys, "--model", "/nowhere", *arguments)
            assert code == expected and told in err and "\n" not in err, (arguments, err)
        for wrong, told in (
            ("anna short", "key 1"),
            ("anna a-long-key more", "key 1"),
            ("an.na a-long-key", "'an.na'"),
        ):
            keys.write_text(f"{wrong}\n")
            assert told in run(capsys, "--api-key-file", str(keys))[1]
        keys.write_text("short\n")
        assert "key 1" in run(capsys, "--api-key-file", str(keys))[1]


@pytest.fixture
def started(folder, tmp_path):
    """A server as a process of its own."""
    environment = {**os.environ, "LONGSPAN_SESSIONS": str(tmp_path / "sessions"), "LONGSPAN_CACHE": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", "serve", "--model", str(folder), "--port", str(port), "-a", "dense"],
        env=environment | {"LONGSPAN_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "sessions:" in line:
            break
    assert process.poll() is None, lines
    yield process, f"http://127.0.0.1:{port}", lines
    process.kill()
    process.wait()
    process.stderr.close()


def test_killed_under_load_its_sessions_are_there(started, folder, tmp_path, monkeypatch):
    process, url, lines = started
    assert any("/v1" in line and url in line for line in lines)
    http = httpx2.Client(base_url=url, timeout=30)
    for name in ("one", "two"):
        assert http.post("/v1/sessions", json={"name": name, "documents": [{"text": TEXT}]}).status_code == 201

    def load(number):
        try:
            while True:
                body = {"documents": [{"name": f"{number}", "text": f"Pier {number} {time.perf_counter()}. " * 20}]}
                http.post("/v1/sessions/one/documents", json=body)
        except httpx2.HTTPError:
            pass

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for thread in threads:
        thread.join()
    store = SessionStore(tmp_path / "sessions")
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path))
    llm = LLM(str(folder), "dense", device="cpu", store=store)
    for name in ("one", "two"):
        session = llm.session(name)
        assert session.documents[0].text == TEXT
        assert llm.prefill(session).cached_tokens > len(llm.model.tokens(TEXT)), "it goes on from there"


def test_asked_to_stop_an_answer_finishes_and_sessions_are_saved(tiny, own_places):
    with Live(LLM(tiny, "dense", store=SessionStore(own_places / "sessions"))) as live:
        live.http.post("/v1/sessions", json={"name": "kept", "documents": [{"text": TEXT}]})
        body = {
            "model": live.model, "prompt": "The gate", "max_tokens": 200, "stream": True, "logit_bias": {"0": -100},
        }  # fmt: skip
        with live.http.stream("POST", "/v1/completions", json=body) as answer:
            events = answer.iter_lines()
            next(line for line in events if line.startswith("data: "))
            live.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in events if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    with pytest.raises(OSError):
        socket.create_connection(live.address, timeout=1)
    assert SessionStore(own_places / "sessions").show("kept").state["documents"]


@pytest.mark.parametrize("twice", [False, True])
def test_stopped_in_the_middle_a_client_is_told_and_what_was_read_is_saved(tiny, own_places, twice):
    store, name = SessionStore(own_places / "sessions"), f"middle-{twice}"
    live, answers = Live(LLM(tiny, "dense", store=store), grace=30 if twice else 1), []
    with live:
        live.http.post("/v1/sessions", json={"name": name, "documents": [{"name": "gate", "text": TEXT}]})
        body = {"documents": [{"name": "long", "text": "".join(f"Pier {i} is shut. " for i in range(20_000))}]}

        def read():
            answers.append(live.http.post(f"/v1/sessions/{name}/documents", json=body))

        thread = threading.Thread(target=read)
        thread.start()
        while not live.scheduler.metrics().reading_now:
            time.sleep(0.005)
        asked = time.perf_counter()
        live.server.handle_exit(signal.SIGTERM, None)
        if twice:
            live.server.handle_exit(signal.SIGTERM, None)
        thread.join()
    assert time.perf_counter() - asked < 15, "it waited on"
    assert answers[0].status_code == 503 and answers[0].json()["error"]["type"] == "server_error", answers[0].text
    assert [each["name"] for each in store.show(name).state["documents"]] == ["gate", "long"]
