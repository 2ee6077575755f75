"""Requests that nobody sends by accident, and sessions that go away while somebody waits for them."""

import json
import threading
import time

import pytest

from longspan.engine.serving import Limits, Metrics
from longspan.engine.serving.holdings import Holdings
from longspan.errors import SaveError
from longspan.sessions.session import Turn

HALF = "a\ud800b"


def post(live, path, body):
    head = {"Content-Type": "application/json"}
    return live.http.post(path, content=json.dumps({"model": live.model, **body}), headers=head)


def call(arguments):
    """A conversation with a call of a tool."""
    function = {"name": "look", "arguments": arguments}
    made = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    return [{"role": "user", "content": "Look."}, made, {"role": "tool", "tool_call_id": "1", "content": "Nothing."}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("/v1/chat/completions", {"messages": call('{"a": "\\ud800"}')}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stop": HALF}),
        ("/v1/responses", {"input": "x", "instructions": HALF}),
        ("/v1/completions", {"prompt": ["x", HALF]}),
    ],
)
def test_half_a_character_is_refused(live, path, body):
    answer = post(live, path, {**body, "max_output_tokens" if "input" in body else "max_tokens": 2})
    assert answer.status_code == 400, answer.text
    assert "engine" not in answer.json()["error"]["message"]


def test_a_calls_arguments_may_be_any_text(live):
    for arguments in ("", "no JSON", "[" * 20_000, "[" * 300 + "]" * 300):
        answer = post(live, "/v1/chat/completions", {"messages": call(arguments), "max_tokens": 2})
        told = answer.json().get("error", {}).get("code", "")
        assert answer.status_code == 200 or told == "context_length_exceeded", answer.text


@pytest.mark.parametrize(
    ("path", "body", "param", "told"),
    [
        ("/v1/completions", {"prompt": [1, -1]}, "prompt.1", "greater than or equal to 0"),
        ("/v1/completions", {"prompt": ["x"] * 257}, "prompt", "at most 256"),
        ("/v1/completions", {"prompt": []}, "prompt", "at least 1"),
        ("/v1/completions", {}, "prompt", "missing"),
        ("/v1/completions", {"prompt": "x", "stop": ["x", ""]}, "stop.1", "at least 1"),
        ("/v1/responses", {"input": [{"role": "user"}]}, "input.0.content", "missing"),
        ("/v1/responses", {"input": [{"role": "user", "content": "x", "odd": 1}]}, "input.0.odd", "unknown field"),
    ],
)
def test_a_refusal_names_the_field_as_it_was_sent(live, path, body, param, told):
    answer = post(live, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and told in error["message"], error


def test_where_the_model_lies_is_not_told(live):
    answer = post(live, "/v1/completions", {"prompt": "word " * 3000})
    assert answer.status_code == 400 and "/" not in answer.json()["error"]["message"], answer.text


def test_a_session_deleted_before_a_requests_turn_does_not_come_back(live):
    live.http.post("/v1/sessions", json={"name": "gone", "documents": [{"text": "The gate is shut."}]})
    how = {"question": "Why?", "max_tokens": 500, "stream": True, "logit_bias": {"0": -100}}
    answers = {}

    def later(name, method, path, body):
        answers[name] = live.http.request(method, path, json=body)

    threads = [
        threading.Thread(target=later, args=("ask", "POST", "/v1/sessions/gone/ask", {**how, "stream": False})),
        threading.Thread(target=later, args=("delete", "DELETE", "/v1/sessions/gone", None)),
    ]
    with live.http.stream("POST", "/v1/sessions/gone/ask", json=how) as first:
        lines = first.iter_lines()  # held: a client that lets go of it has gone
        next(line for line in lines if line.startswith("data: "))
        threads[0].start()
        until = time.perf_counter() + 10
        while not live.scheduler.metrics().waiting_now and time.perf_counter() < until:
            time.sleep(0.002)
        assert live.scheduler.metrics().waiting_now, "the second is to wait while the first is answered"
        threads[1].start()
        while len(live.scheduler._rounds.queue) < 2 and time.perf_counter() < until:
            time.sleep(0.002)
        assert len(live.scheduler._rounds.queue) == 2, "who deletes came after who asks, and goes first"
    for thread in threads:
        thread.join()
    assert answers["delete"].status_code == 200, answers["delete"].text
    assert answers["ask"].status_code == 404, answers["ask"].text
    assert live.http.get("/v1/sessions/gone").status_code == 404


def test_a_session_that_cannot_be_saved_is_not_made(live, monkeypatch):
    def full(session):
        raise SaveError("the disk is full: free some")

    with monkeypatch.context() as patch:
        patch.setattr(live.llm, "save", full)
        assert live.http.post("/v1/sessions", json={"name": "unsaved"}).status_code == 507
    assert live.http.get("/v1/sessions/unsaved").status_code == 404
    assert live.http.post("/v1/sessions", json={"name": "unsaved"}).status_code == 201


def test_one_session_that_cannot_be_saved_leaves_the_others_saved(live, monkeypatch):
    held, save = Holdings(live.llm, Limits()), live.llm.save

    def saved(session):
        if session.name == "left-a":
            raise SaveError("the disk is full: free some")
        save(session)

    for name in ("left-a", "left-b"):
        held.session(name).turns.append(Turn("Who?", "Lise."))
        held.residents.release(name)
    monkeypatch.setattr(live.llm, "save", saved)
    with pytest.raises(SaveError):
        held.clear(save=True)
    assert live.llm.store.exists("left-b") and not len(held.residents)


def test_counters_are_copied_while_they_are_counted():
    counters, done = Metrics(), {"stop", "length", "read", "cancelled", "error"}
    assert set(counters.finished) == done, "a dictionary that grows can't be copied from another thread"


def test_a_schema_too_wide_to_be_followed_is_told_not_cut_short(live):
    forms = [{"type": "object", "properties": {f"a{i}{j}": {"type": "string"} for j in range(30)}} for i in range(60)]
    how = {"type": "json_schema", "json_schema": {"name": "wide", "schema": {"anyOf": forms}}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": how, "max_tokens": 20}
    answer = post(live, "/v1/chat/completions", body)
    assert answer.status_code == 400 and "simpler" in answer.json()["error"]["message"], answer.text
