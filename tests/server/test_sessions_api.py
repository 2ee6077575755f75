"""Sessions over HTTP: documents are read once, asked, forked, brought back and deleted."""

import json
import threading

TEXT = "The code of the gate is 7315. Lise keeps the spare key. " * 3


def made(live, name, **more):
    answer = live.http.post("/v1/sessions", json={"name": name, **more})
    assert answer.status_code == 201, answer.text
    return answer.json()


def ask(live, name, **how):
    answer = live.http.post(f"/v1/sessions/{name}/ask", json={"question": "What is the code?", "max_tokens": 6, **how})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_session_from_beginning_to_end(live):
    assert made(live, "walk", documents=[{"name": "gate", "text": TEXT}])["documents"][0]["name"] == "gate"
    assert live.http.post("/v1/sessions", json={"name": "walk"}).status_code == 409
    first = ask(live, "walk")
    assert first["citations"][0]["doc"] == "gate" and first["citations"][0]["text"] in TEXT
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    told = live.http.get("/v1/sessions/walk").json()
    assert told["turns"] == 1 and told["bytes"] > 0
    assert live.http.post("/v1/sessions/walk/fork", json={"name": "other"}).status_code == 201
    ask(live, "other")
    assert live.http.get("/v1/sessions/other").json()["turns"] == 2
    assert live.http.get("/v1/sessions/walk").json()["turns"] == 1
    names = {each["id"] for each in live.http.get("/v1/sessions").json()["data"]}
    assert {"walk", "other"} <= names
    assert live.http.delete("/v1/sessions/walk").json()["deleted"]
    for answer in (
        live.http.get("/v1/sessions/walk"),
        live.http.delete("/v1/sessions/walk"),
        live.http.post("/v1/sessions/walk/ask", json={"question": "?"}),
        live.http.post("/v1/sessions/walk/documents", json={"documents": [{"text": "x"}]}),
    ):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "session_not_found"
    assert ask(live, "other", remember=False)["answer"], "a fork outlives its parent"


def test_a_session_goes_back(live):
    made(live, "back", documents=[{"text": TEXT}])
    ask(live, "back")
    live.http.post("/v1/sessions/back/save")  # an answer does not wait for the disk, this does
    before = live.llm.store.commits("back")[-1][0]
    live.http.post("/v1/sessions/back/documents", json={"documents": [{"name": "more", "text": "The pier is shut."}]})
    assert len(live.http.get("/v1/sessions/back").json()["documents"]) == 2
    assert live.http.post("/v1/sessions/back/restore", json={"commit": before}).status_code == 200
    told = live.http.get("/v1/sessions/back").json()
    assert len(told["documents"]) == 1 and told["turns"] == 1
    assert ask(live, "back", remember=False)["answer"]
    assert live.http.post("/v1/sessions/back/restore", json={"commit": 99}).status_code == 400


def test_files_are_uploaded(live):
    made(live, "files")
    files = [
        ("files", ("../../gate.md", TEXT.encode(), "text/markdown")),
        ("files", ("page.html", b"<html><body><p>The ferry leaves from pier 12.</p></body></html>", "text/html")),
    ]
    told = live.http.post("/v1/sessions/files/files", files=files).json()
    assert [each["name"] for each in told["documents"]] == ["gate.md", "page.html"]
    spoilt = live.http.post("/v1/sessions/files/files", files=[("files", ("a.bin", b"\x00\x01\x02" * 50))])
    assert spoilt.status_code == 400 and "a.bin" in spoilt.json()["error"]["message"]


def test_an_answer_streams_and_is_the_same(live):
    made(live, "stream", documents=[{"text": TEXT}])
    whole = ask(live, "stream", remember=False)
    how = {"question": "What is the code?", "max_tokens": 6, "remember": False, "stream": True}
    with live.http.stream("POST", "/v1/sessions/stream/ask", json=how) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    told = [json.loads(each) for each in events[:-1]]
    assert "".join(each["delta"] for each in told[:-1]) == told[-1]["answer"] == whole["answer"]


def test_chat_asks_a_session_with_citations(live):
    made(live, "chat", documents=[{"name": "gate", "text": TEXT}])
    answer = live.client.chat.completions.create(
        model=live.model, messages=[{"role": "user", "content": "What is the code?"}], max_tokens=6, temperature=0,
        extra_body={"session_id": "chat", "citations": True},
    )  # fmt: skip
    assert answer.choices[0].message.citations[0]["doc"] == "gate"
    assert answer.usage.prompt_tokens_details.cached_tokens > 50
    assert answer.choices[0].message.content == ask(live, "chat", remember=False)["answer"]
    chunks = list(live.client.chat.completions.create(
        model=live.model, messages=[{"role": "user", "content": "What is the code?"}], max_tokens=6, stream=True,
        extra_body={"session_id": "chat", "citations": True},
    ))  # fmt: skip
    assert chunks[-1].choices[0].delta.citations[0]["doc"] == "gate"


def test_a_session_is_told_of_while_the_engine_works(live):
    made(live, "told", documents=[{"text": TEXT}])
    ask(live, "told")
    stop, begun = threading.Event(), threading.Event()

    def busy(llm, held):
        begun.set()
        stop.wait(10)

    waits = live.scheduler.run(busy, "told")
    assert begun.wait(5)
    try:
        answer = live.http.get("/v1/sessions/told", timeout=5)
        assert answer.json()["turns"] == 1 and "told" in live.http.get("/v1/sessions", timeout=5).text
    finally:
        stop.set()
        waits.result(10)
