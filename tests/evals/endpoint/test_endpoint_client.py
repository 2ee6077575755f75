"""Requests to a real server: what is sent, what is tried again and when, and what every failure means."""

import json
import math
import threading
import time
from email.utils import formatdate

import pytest

from endpoint_server import Failure, Server
from longspan.errors import Cancelled, EndpointError, LongspanError, UsageError
from longspan.evals.endpoint import client as module
from longspan.evals.endpoint.client import TRIES, Client, Refused
from longspan.evals.endpoint.stream import Answer, BrokenAnswerError, streamed, whole

BODY = {"model": "scripted", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 9, "temperature": 0}
BODY |= {"stream": True, "stream_options": {"include_usage": True}}
CHAT = "chat/completions"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses without a word from the endpoint are short, and no proxy stands between."""
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def client_of(server, key="", told=None, **options):
    options = {"parallel": 4, "timeout": 20.0, **options}
    return Client(server.url, key, tell=(told if told is not None else []).append, **options)


def test_an_answer_with_its_times_and_counts():
    with Server(lambda prompt: f"seven of {prompt}") as server:
        answer = client_of(server).ask(CHAT, BODY)
    assert answer.text == "seven of one two" and answer.pieces == 4
    assert 0 < answer.first <= answer.seconds
    assert answer.count("prompt_tokens") == 2 and answer.count("prompt_tokens_details", "cached_tokens") == 1
    assert answer.count("nothing", "there") is None
    (request,) = server.requests
    assert request.path == "/v1/chat/completions" and request.body == BODY and "authorization" not in request.headers


def test_an_endpoint_need_neither_stream_nor_count():
    with Server(streams=False) as server:
        answer = client_of(server).ask("completions", {"model": "scripted", "prompt": "x"})
        assert answer.text == "seven" and answer.first == 0 < answer.seconds and answer.count("prompt_tokens") == 1
    with Server(counts=False) as server:
        answer = client_of(server).ask(CHAT, BODY)
        assert answer.text == "seven" and answer.usage == {} and answer.pieces == 1


@pytest.mark.parametrize(
    "failures",
    [
        [Failure(status) for status in (500, 502, 503, 529)],
        [Failure(status) for status in (408, 409, 425, 429)],
        [Failure(how="drop")] * 3,
        [Failure(how="half")] * 3,
        [Failure(503, "overloaded", how="event"), Failure(how="half"), Failure(how="drop")],
    ],
    ids=["server", "later", "dropped", "half an answer", "in the stream"],
)
def test_what_may_go_well_another_time_is_tried_again(failures):
    told = []
    with Server() as server:
        server.failures = list(failures)
        assert client_of(server, told=told).ask(CHAT, BODY).text == "seven"
    assert len(server.requests) == len(failures) + 1 and len(told) == len(failures)
    assert all("trying again in" in line for line in told)


def test_it_gives_up_in_the_end():
    with Server() as server:
        server.failures = [Failure(503, "still loading")] * 99
        with pytest.raises(EndpointError, match=rf"failed {TRIES} times, at last: 503 still loading"):
            client_of(server).ask(CHAT, BODY)
    assert len(server.requests) == TRIES


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_it_waits_as_long_as_the_endpoint_wishes(kind):
    with Server() as server:
        client = client_of(server)
        until = time.time() + 0.4 if kind == "seconds" else math.floor(time.time() + 1.5)
        wish = "0.4" if kind == "seconds" else formatdate(until, usegmt=True)
        server.failures = [Failure(429, "slow down", {"Retry-After": wish})]
        client.ask(CHAT, BODY)
        assert time.time() >= until - 0.01


def test_whoever_asks_waits_until_requests_are_welcome_again():
    with Server() as server:
        client = client_of(server)
        server.failures = [Failure(429, "slow down", {"Retry-After": "0.5"})]
        began = time.monotonic()
        other = threading.Thread(target=client.ask, args=(CHAT, BODY))
        other.start()
        while client._wait_until < began:
            time.sleep(0.005)
        client.ask(CHAT, BODY)
        assert time.monotonic() - began >= 0.5, "one that was not refused waits as well"
        other.join()


def test_a_wish_beyond_reason_ends_the_run():
    with Server() as server:
        server.failures = [Failure(429, "quota", {"Retry-After": "86400"})]
        with pytest.raises(EndpointError, match="asks to wait 86400 s"):
            client_of(server).ask(CHAT, BODY)


@pytest.mark.parametrize(
    "status,error",
    [
        (400, {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens"}),
        (400, {"message": "no words for it", "code": "context_length_exceeded"}),
        (400, {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}),
        (400, {"message": "The input (9000 tokens) is longer than the model's context length (8192 tokens)."}),
        (413, {"message": "Payload"}),
        (422, {"message": "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 9000"}),
        (400, {"message": "prompt is too long: 210000 tokens > 200000 maximum"}),
    ],
)
def test_a_context_that_is_too_long_is_this_questions_trouble_alone(status, error):
    with Server() as server:
        server.failures = [Failure(status, error)]
        client = client_of(server)
        with pytest.raises(Refused, match="the context is too long: "):
            client.ask(CHAT, BODY)
        assert client.ask(CHAT, BODY).text == "seven" and len(server.requests) == 2


def test_what_a_filter_refuses_is_this_questions_trouble_alone():
    with Server() as server:
        server.failures = [Failure(400, {"message": "not nice", "code": "content_filter"})]
        with pytest.raises(Refused, match="refused for what it says: not nice"):
            client_of(server).ask(CHAT, BODY)


@pytest.mark.parametrize(
    "unknown", [("max_tokens",), ("stream_options",), ("temperature",), ("max_tokens", "temperature")]
)
def test_fields_that_an_endpoint_does_not_know_are_left_out(unknown):
    with Server(unknown=unknown) as server:
        client = client_of(server)
        assert client.ask(CHAT, BODY).text == "seven" and client.ask(CHAT, BODY).text == "seven"
    assert len(server.requests) == 2 + len(unknown), "it is learned once"
    last = server.requests[-1].body
    assert not set(unknown) & set(last) and ("max_completion_tokens" in last) == ("max_tokens" in unknown)


def test_fields_are_learned_by_several_at_once():
    with Server(unknown=("max_tokens",)) as server:
        client, found, barrier = client_of(server), [], threading.Barrier(4)

        def ask():
            barrier.wait()
            found.append(client.ask(CHAT, BODY).text)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["seven"] * 4


@pytest.mark.parametrize(
    "options,key,model,path,kind,told",
    [
        ({"key": "secret"}, "", "scripted", CHAT, EndpointError, "wants a key (401): set LONGSPAN_API_KEY"),
        ({"key": "secret"}, "wrong-key", "scripted", CHAT, EndpointError, "refuses the key (401): Incorrect API key"),
        ({}, "", "other", CHAT, EndpointError, "does not serve the model: The model `other` does not exist."),
        ({}, "", "scripted", "chatter", EndpointError, "has no chatter: give the protocol's root"),
    ],
)
def test_what_befalls_every_question_ends_the_run(options, key, model, path, kind, told):
    with Server(**options) as server, pytest.raises(kind) as caught:
        client_of(server, key).ask(path, {**BODY, "model": model})
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert "wrong-key" not in str(caught.value), "the endpoint's message had it"
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "failure,told",
    [
        (Failure(400, "an odd request"), r"refuses the request \(400\): an odd request"),
        (Failure(308, "", {"Location": "http://there/v1"}), "has moved to http://there/v1"),
        (Failure(418, {"detail": "teapot"}), r"refuses the request \(418\): teapot"),
    ],
)
def test_other_refusals_are_told_as_they_are(failure, told):
    with Server() as server:
        server.failures = [failure]
        with pytest.raises(EndpointError, match=told):
            client_of(server).ask(CHAT, BODY)


def test_the_key_is_sent_in_a_header():
    with Server(key="secret") as server:
        client = client_of(server, "secret")
        assert client.model(None) == "scripted" and client.ask(CHAT, BODY).text == "seven"
    assert server.requests[0].headers["authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(server.requests[0].body)


def test_the_model_is_the_only_one_or_the_one_named():
    with Server(models=("only",)) as server:
        assert client_of(server).model(None) == client_of(server).model("only") == "only"
        with pytest.raises(EndpointError, match="has no model 'other': use --model with one of only"):
            client_of(server).model("other")
    with Server(models=tuple(f"m{i}" for i in range(11))) as server:
        with pytest.raises(UsageError, match="it has m0, m1, m2, m3, m4, m5, m6, m7 and 3 more"):
            client_of(server).model(None)
        assert client_of(server).model("m9") == "m9"
    with Server(models=()) as server:
        assert client_of(server).model("whatever") == "whatever"
        with pytest.raises(UsageError, match="does not list its models"):
            client_of(server).model(None)
    with Server(key="secret") as server, pytest.raises(EndpointError, match="wants a key"):
        client_of(server).model(None)


def test_nobody_there_is_told():
    with Server() as server:
        url = server.url
    client = Client(url, "", parallel=1, timeout=5)
    with pytest.raises(EndpointError, match=r"can't reach http://127.0.0.1:\d+/v1: Connection refused"):
        client.model("x")
    with pytest.raises(EndpointError, match=rf"failed {TRIES} times, at last: Connection refused"):
        client.ask(CHAT, BODY)


def test_silence_is_waited_for_no_longer_than_allowed():
    with Server() as server:
        ended = threading.Event()
        server.gate = lambda: ended.wait(60) and None
        began = time.monotonic()
        with pytest.raises(EndpointError, match="no word in the time allowed"):
            client_of(server, timeout=0.1).ask(CHAT, BODY)
        assert time.monotonic() - began < 50
        ended.set()


@pytest.mark.parametrize("wait", ["answer", "pause"])
def test_closing_wakes_whoever_waits(wait):
    with Server() as server:
        ended = threading.Event()
        if wait == "answer":
            server.gate = lambda: ended.wait(300) and None
        else:
            server.failures = [Failure(429, "later", {"Retry-After": "300"})]
        client, raised = client_of(server, timeout=300), []

        def ask():
            try:
                client.ask(CHAT, BODY)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.requests or server.failures:
            time.sleep(0.005)
        time.sleep(0.05)
        client.close()
        thread.join(30)
        assert not thread.is_alive() and isinstance(raised[0], Cancelled)
        ended.set()


def test_a_connection_that_is_opened_while_all_is_closed_ends_too(monkeypatch):
    """The thread is past the last look at whether it was stopped, and its connection is not there yet."""
    with Server() as server:
        ended, reached, closed = threading.Event(), threading.Event(), threading.Event()
        server.gate = lambda: ended.wait(300) and None
        client, raised, trace = client_of(server, timeout=300), [], Client._trace

        def slow(self, name, info):
            if name == "connection.connect_tcp.complete":
                reached.set()
                closed.wait(60)
            trace(self, name, info)

        monkeypatch.setattr(Client, "_trace", slow)

        def ask():
            try:
                client.ask(CHAT, BODY)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert reached.wait(60)
        # The pool itself is busy with the connection until it is there.
        monkeypatch.setattr(client._http, "close", lambda: None)
        client.close()
        closed.set()
        thread.join(30)
        assert not thread.is_alive() and isinstance(raised[0], Cancelled)
        ended.set()


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://x/v1", "http://", "http://x/v1?key=3", "http://[", "x"]
    + ["http://x/v\x00", "http://a..b/v1", f"http://{'a' * 64}/v1"],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UsageError, match="--base-url"):
        Client(url, "", parallel=1, timeout=1)


@pytest.mark.parametrize(
    "url",
    ["http://me:hidden@host/v1", "http://me:hidden@ho st/v1", "http://me:hidden@host:port/v1", "me:hidden@host/v1"]
    + ["ftp://me:hidden@host", "http:/me:hidden@[", "http://me:hidden@a..b/v1", "//me:hidden@host\x00"],
)
def test_a_password_in_the_url_is_refused_and_not_shown(url):
    with pytest.raises(UsageError, match="password") as caught:
        Client(url, "", parallel=1, timeout=1)
    assert "hidden" not in str(caught.value)


def test_a_path_may_hold_any_sign():
    assert Client("http://host:1/@me/v1", "", parallel=1, timeout=1).url == "http://host:1/@me/v1"


def test_a_slash_at_the_end_changes_nothing():
    assert Client("http://host:1/v1/", "", parallel=1, timeout=1).url == "http://host:1/v1"


def test_thoughts_are_no_answer_but_the_first_token():
    lines = [
        'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}',
        'data: {"choices": [{"delta": {"content": "7"}, "finish_reason": "stop"}]}',
    ]
    answer = Answer()
    answer.began -= 1
    found = streamed(lines, answer)
    assert found.text == "7" and found.first >= 1 and found.pieces == 2, "an end without [DONE] is one, too"


def test_a_content_may_be_a_list_of_parts():
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "se"}]
    event = {"choices": [{"message": {"content": [*parts, {"type": "text", "text": "ven"}]}}]}
    assert whole(json.dumps(event).encode(), Answer()).text == "seven"


@pytest.mark.parametrize("choices", ["3", '[{"delta": "x"}]', '[{"delta": {"content": 5}}]', '[{"text": [5]}]'])
def test_a_choice_of_another_form_is_broken(choices):
    with pytest.raises(BrokenAnswerError):
        whole(f'{{"choices": {choices}}}'.encode(), Answer())


@pytest.mark.parametrize("lines", [[], ["data: {"], ["data: 3"], ['data: {"choices": [3]}', "data: [DONE]"]])
def test_what_is_no_answer_is_broken(lines):
    with pytest.raises(BrokenAnswerError):
        streamed(lines, Answer())
    with pytest.raises(BrokenAnswerError):
        whole(b"<html>", Answer())
    assert issubclass(EndpointError, LongspanError)
