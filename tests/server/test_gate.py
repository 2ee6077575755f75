"""Keys, sizes, other sites' pages, clients that leave or read nothing."""

import contextlib
import json
import socket
import threading
import time

import pytest
from live import Live

from longspan import LLM
from longspan.engine.serving import Limits
from longspan.server.gate import Keys
from longspan.server.serving import ServerOptions
from longspan.sessions.store import SessionStore

KEYS = ("first-secret-key", "second-secret-key")


@pytest.fixture(scope="module")
def guarded(tiny, own_places):
    folder = own_places / "documents"
    folder.mkdir()
    (folder / "gate.txt").write_text("The code of the gate is 7315.", encoding="utf-8")
    (own_places / "secret.txt").write_text("Nobody may read this.", encoding="utf-8")
    (folder / "link.txt").symlink_to(own_places / "secret.txt")
    options = ServerOptions(
        keys=KEYS,
        hosts=("127.0.0.1",),
        documents=folder,
        body_bytes=50_000,
        upload_bytes=100_000,
        body_seconds=0.5,
        send_seconds=0.5,
    )
    llm = LLM(tiny, "dense", store=SessionStore(own_places / "sessions"))
    with Live(llm, options, Limits(queue=2, sequences=1)) as made:
        yield made


def body(live, **how):
    return {"model": live.model, "messages": [{"role": "user", "content": "The gate"}], "max_tokens": 300, **how}


def raw(live, head, rest=b""):
    """Send bytes; return what comes until the server closes or falls silent."""
    with socket.create_connection(live.address, timeout=2) as made:
        made.settimeout(2)
        with contextlib.suppress(OSError):  # the server may close before all is sent
            made.sendall(head.encode() + rest)
        answer = b""
        with contextlib.suppress(OSError):
            while part := made.recv(65536):
                answer += part
        return answer


def test_a_key_is_needed_and_any_of_them_does(guarded):
    for key, status in ((KEYS[0], 200), (KEYS[1], 200), ("third-secret-key", 401), ("x", 401)):
        answer = guarded.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status, key
    assert guarded.http.get("/v1/models", headers={"Authorization": KEYS[0]}).status_code == 401
    for path in ("/health", "/ready"):
        assert guarded.http.get(path, headers={"Authorization": ""}).status_code == 200
    assert guarded.http.get("/metrics", headers={"Authorization": ""}).status_code == 401


def test_keys_are_all_compared(monkeypatch):
    from longspan.server import gate

    seen = []
    compare = gate.hmac.compare_digest
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: seen.append(b) or compare(a, b))
    keys = Keys(KEYS)
    assert keys.number(KEYS[0].encode()) == 0 and len(seen) == 2
    assert keys.number(b"another") is None and len(seen) == 4
    assert not any(KEYS[0].encode() in each for each in seen), "digests alone are held"


def test_pages_of_other_sites_are_refused(guarded):
    assert guarded.http.get("/v1/models", headers={"Origin": "http://evil.example"}).status_code == 403
    assert guarded.http.get("/v1/models", headers={"Origin": "http://[evil"}).status_code == 403
    assert guarded.http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    assert guarded.http.get("/v1/models", headers={"Origin": guarded.url}).status_code == 200


def test_what_is_written_is_sent_at_once(guarded):
    guarded.http.get("/health")
    sockets = [each.transport.get_extra_info("socket") for each in list(guarded.server.server_state.connections)]
    assert sockets and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in sockets)


@pytest.mark.parametrize("path", ["../secret.txt", "link.txt", "/etc/passwd", "nothing.txt", "a\0b", "."])
def test_no_path_leads_out_of_the_folder(guarded, path):
    guarded.http.post("/v1/sessions", json={"name": "paths"})
    answer = guarded.http.post("/v1/sessions/paths/documents", json={"documents": [{"path": path}]})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "document_not_found"
    assert "secret" not in answer.json()["error"]["message"].replace("../secret.txt", "")


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fx", ".hidden", "a%2fb", "x%00", "ü", "a" * 101])
def test_no_name_leads_out_of_the_sessions(guarded, name):
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/save")):
        answer = guarded.http.request(method, f"/v1/sessions/{name}{path}")
        assert answer.status_code in (400, 404, 405), answer.text


def test_documents_below_the_folder_are_read(guarded):
    answer = guarded.http.post("/v1/sessions", json={"name": "below", "documents": [{"path": "gate.txt"}]})
    assert answer.status_code == 201 and answer.json()["documents"][0]["name"] == "gate.txt"


def test_a_long_body_is_refused_before_it_is_read(guarded):
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        "Content-Type: application/json\r\n"
    )
    answer = raw(guarded, f"{head}Content-Length: 900000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer
    chunk = b"%x\r\n" % 30_000 + b" " * 30_000 + b"\r\n"
    assert raw(guarded, f"{head}Transfer-Encoding: chunked\r\n\r\n", chunk * 3).startswith(b"HTTP/1.1 413")
    started = time.perf_counter()
    assert raw(guarded, f"{head}Content-Length: 20\r\n\r\n", b'{"mo').startswith(b"HTTP/1.1 408")
    assert time.perf_counter() - started < 4


def test_long_headers_are_refused(guarded):
    head = "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-Long: "
    assert raw(guarded, head, b"a" * 40_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    answer = raw(guarded, head, b"a" * 1_000_000 + b"\r\n\r\n")
    assert answer == b"" or answer.split()[1] in (b"400", b"431")
    assert guarded.http.get("/health").status_code == 200


def test_a_client_that_leaves_stops_its_request(guarded):
    before = guarded.scheduler.metrics().written_tokens
    for stream in (True, False):
        data = json.dumps(body(guarded, stream=stream, logit_bias={"0": -100})).encode()
        with socket.create_connection(guarded.address) as made:
            made.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEYS[0]}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            while guarded.scheduler.metrics().written_tokens == before:
                time.sleep(0.005)
        assert guarded.idle(5)
        written = guarded.scheduler.metrics().written_tokens
        assert written - before < 300, "it went on to the end"
        before = written


def test_a_client_that_reads_nothing_is_given_up(guarded):
    how = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 900, "logit_bias": {"0": -100}}
    data = json.dumps(body(guarded, **how)).encode()
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        made.connect(guarded.address)
        made.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEYS[0]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        until = time.perf_counter() + 15
        while len(guarded.server.server_state.connections) > 1 and time.perf_counter() < until:
            time.sleep(0.05)
        assert len(guarded.server.server_state.connections) <= 1, "only the tests' own client is connected"
    assert guarded.idle()
    assert guarded.http.get("/v1/models").status_code == 200


def test_a_full_queue_is_told_with_a_time(guarded):
    answers = []

    def ask():
        answers.append(guarded.http.post("/v1/chat/completions", json=body(guarded, logit_bias={"0": -100})))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert guarded.http.get("/health").status_code == 200
    for thread in threads:
        thread.join()
    statuses = sorted(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["type"] == "rate_limit_error"
    text = guarded.http.get("/metrics").text
    assert 'longspan_http_requests_total{method="POST",route="/v1/chat/completions",status="429"}' in text


@pytest.mark.parametrize(
    "sent", [b"", b"{", b"[]", b"null", b'"\\ud800"', b"\xff\xfe", b"[" * 40_000, b'{"model":1e999}', b'{"n":NaN}']
)
def test_odd_bodies_are_refused_in_openais_shape(guarded, sent):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/sessions"):
        answer = guarded.http.post(path, content=sent, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def shared(tiny, own_places):
    """Three keys, of which the first two are one owner's."""
    keys = ("anna-first-key", "anna-second-key", "berts-only-key")
    llm = LLM(tiny, "dense", store=SessionStore(own_places / "owned"))
    with Live(llm, ServerOptions(keys=keys, owners=("anna", "anna", ""), sessions=2)) as made:

        def ask(who, method, path, **how):
            return made.http.request(method, f"/v1{path}", headers={"Authorization": f"Bearer {keys[who]}"}, **how)

        yield made, ask


def test_a_key_sees_its_owners_sessions_alone(shared):
    live, ask = shared
    texts = [{"name": "gate", "text": "The code of the gate is 7315."}]
    assert ask(0, "POST", "/sessions", json={"name": "lease", "documents": texts}).json()["id"] == "lease"
    assert ask(1, "GET", "/sessions/lease").json()["documents"][0]["name"] == "gate"
    assert [each["id"] for each in ask(1, "GET", "/sessions").json()["data"]] == ["lease"]
    assert ask(2, "GET", "/sessions").json()["data"] == []
    stored = live.llm.store.names()
    assert stored == ["anna.lease"]
    chat = {"model": live.model, "messages": [{"role": "user", "content": "Which?"}], "max_tokens": 2}
    for name in ("lease", "anna.lease"):
        for method, path, body in (
            ("GET", "", None), ("DELETE", "", None), ("POST", "/save", None), ("POST", "/restore", {}),
            ("POST", "/fork", {"name": "mine"}), ("POST", "/ask", {"question": "Which?"}),
            ("POST", "/documents", {"documents": texts}),
        ):  # fmt: skip
            answer = ask(2, method, f"/sessions/{name}{path}", json=body)
            assert answer.status_code == 404 and "anna" not in answer.text.replace(name, ""), (path, answer.text)
        assert ask(2, "POST", "/chat/completions", json={**chat, "session_id": name}).status_code == 404
        own = {"model": live.model, "input": "Which?", "session_id": name}
        assert ask(2, "POST", "/responses", json=own).status_code == 404
    assert live.llm.store.names() == stored
    assert (
        ask(1, "POST", "/sessions/lease/ask", json={"question": "Which?", "max_tokens": 2}).json()["session"] == "lease"
    )


def test_two_owners_may_use_one_name_and_each_has_a_quota(shared):
    _, ask = shared
    assert ask(2, "POST", "/sessions", json={"name": "lease"}).status_code == 201
    assert ask(2, "POST", "/sessions/lease/fork", json={"name": "copy"}).status_code == 201
    assert ask(2, "POST", "/sessions", json={"name": "third"}).json()["error"]["code"] == "too_many_sessions"
    assert ask(2, "POST", "/sessions/lease/fork", json={"name": "third"}).status_code == 403
    assert ask(0, "POST", "/sessions", json={"name": "second"}).status_code == 201, "another's do not count"
    assert len(ask(2, "GET", "/sessions/lease").json()["documents"]) == 0
    assert ask(2, "DELETE", "/sessions/lease").json() == {"id": "lease", "object": "session.deleted", "deleted": True}
    assert ask(0, "GET", "/sessions/lease").status_code == 200
    assert ask(0, "POST", "/sessions", json={"name": "n" * 98}).status_code == 400


def test_owners_are_known_by_their_keys_not_by_their_place():
    first, second = Keys(["one-long-key", "two-long-key"]), Keys(["two-long-key", "one-long-key"])
    assert first.owners == second.owners[::-1] and len(set(first.owners)) == 2
    assert Keys(["one-long-key", "two-long-key"], ["anna", ""]).owners == ["anna", first.owners[1]]
