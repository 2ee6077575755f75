"""`--base-url`: evals of models behind an endpoint, from the command line."""

import json
import re
import subprocess
import threading
from pathlib import Path

import pytest
from cli_process import interruptible

from endpoint_server import Failure, Server

ASKED = ("--lengths", "400,600", "--questions", "2")


def reads(prompt):
    return re.search("pass key is ([0-9]+)", prompt)[1]


@pytest.fixture
def here(home, tiny_model, monkeypatch):
    """Asks the pass key of a server, counting by the tiny model's tokenizer."""
    for name in ("LONGSPAN_API_KEY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return ("--tokenizer", str(tiny_model), *ASKED)


def test_an_endpoint_is_asked_as_a_model_here_is(cli, here, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with Server(reads, key="sk-very-secret") as server:
        given = ("eval", "passkey", "--base-url", server.url, *here, "--api-key-env", "MY_KEY", "--out", "found")
        code, out, err = cli(*given, "--parallel", "2", "--json")
        assert code == 0, err
        found = json.loads(out)
        asked = len(server.requests)
        code, again, err = cli(*given, "--json")
        assert code == 0 and len(server.requests) == asked == 4, "a second run asks nothing"
        code, out, err = cli(*given, "--completions")
    assert code == 0 and len(server.requests) == 8, "completions are another way to ask"
    assert [row["score"] for row in found["rows"]] == [1.0] * 4 and json.loads(again)["rows"] == found["rows"]
    assert found["device"] == f"the endpoint {server.url}" and found["model"] == "scripted" and found["tokenizer"]
    assert "threads" not in found and "torch" in found
    assert "100.0" in out and "report: found/report.html" in err
    for file in Path("found").iterdir():
        assert b"sk-very-secret" not in file.read_bytes(), file
    code, out, err = cli("eval", "report", "found")
    assert code == 0 and f"chat, from {server.url}" in out and f"completions, from {server.url}" in out


def test_lengths_are_counted_by_the_default_models_tokenizer_with_a_note(cli, here, tiny_model, monkeypatch):
    from longspan.hf import loading

    monkeypatch.setattr(loading, "load_tokenizer", lambda name, say, real=loading.load_tokenizer: real(str(tiny_model)))
    with Server(reads) as server:
        code, _, err = cli("eval", "passkey", "--base-url", server.url, *ASKED)
    assert code == 0 and "note: lengths are counted by the tokenizer of" in err and "--tokenizer" in err


def test_what_is_too_long_is_counted_and_told(cli, here):
    with Server(reads, window=130) as server:
        code, _, err = cli("eval", "passkey", "--base-url", server.url, *here, "--out", "found")
    assert code == 0, err
    assert "no answer: the context is too long: This model's maximum context length" in err
    page = Path("found/report.html").read_text()
    assert "2 of 4 questions got no answer and count as wrong" in page and "the context is too long" in page


def test_a_run_that_failed_goes_on(cli, here, monkeypatch):
    monkeypatch.setattr("longspan.evals.endpoint.client._FIRST_PAUSE", 0.01)
    with Server(reads) as server:
        given = ("eval", "passkey", "--base-url", server.url, *here, "--out", "found")
        server.gate = lambda: server.failures.extend([Failure(503, "overloaded")] * 6)
        code, out, err = cli(*given)
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith(f"longspan: {server.url} failed 6 times, at last: 503 overloaded")
        assert err.splitlines()[-1].endswith("the same command goes on from found")
        server.gate = lambda: None
        server.failures.clear()
        code, _, err = cli(*given)
    assert code == 0 and "[2/4]" in err and "[1/4]" not in err


@pytest.mark.parametrize(
    "arguments,told",
    [
        (("--base-url", "nowhere"), "is no endpoint"),
        (("--base-url", "http://127.0.0.1:9/v1"), "can't reach http://127.0.0.1:9/v1"),
        (("--base-url", "http://a:b@127.0.0.1/v1"), "password"),
        (("--base-url", "{url}", "--model", "other"), "has no model 'other'"),
        (("--base-url", "{url}", "--attention", "dense"), "--attention is for a model that runs here"),
        (("--base-url", "{url}", "--adapter", "taught"), "--adapter is for a model that runs here"),
        (("--base-url", "{url}", "--kv", "int4", "--budgets", "1/4"), "--budgets, --kv is for a model"),
        (("--base-url", "{url}", "--parallel", "0"), "--parallel 0"),
        (("--base-url", "{url}", "--timeout", "0"), "--timeout 0"),
        (("--base-url", "{url}", "--tokenizer", "nothing"), "nothing"),
        (("--base-url", "{url}", "--api-key-env", "NOT_SET"), "NOT_SET, which is not set"),
        (("--base-url", "{url}", "--api-key-file", "gone"), "can't read the key in gone"),
        (("--base-url", "{url}", "--api-key-file", "minutes.txt"), "no key has"),
        (("--base-url", "{url}", "--api-key-file", "x", "--api-key-env", "HOME"), "give one of the two"),
        (("--completions",), "--completions is for an endpoint"),
        (("--parallel", "4", "--tokenizer", "x"), "--parallel, --tokenizer is for an endpoint"),
    ],
)
def test_what_can_not_be_asked_is_told_in_one_line(cli, here, arguments, told):
    with Server(reads) as server:
        filled = [word.format(url=server.url) for word in arguments]
        given = [] if "--base-url" not in arguments or "--tokenizer" in arguments else here[:2]
        code, out, err = cli("eval", "passkey", *given, *ASKED, *filled)
        assert code != 0 and out == "" and server.requests == []
    assert told in err.splitlines()[-1] and "Traceback" not in err and "internal error" not in err


def test_perplexity_can_not_be_asked_of_an_endpoint(cli, here):
    with Server(reads) as server:
        code, out, err = cli("eval", "perplexity", "--base-url", server.url, *here)
    assert (code, out, server.requests) == (2, "", []) and len(err.splitlines()) == 1, "before anything is loaded"
    assert "the probability of a text, which an endpoint does not give" in err


def test_ctrl_c_does_not_wait_for_answers(here):
    import signal

    with Server(reads) as server:
        ended = threading.Event()
        asked = threading.Event()

        def gate():
            asked.set()
            ended.wait(300)

        server.gate = gate
        process = subprocess.Popen(
            interruptible("eval", "passkey", "--base-url", server.url, *here, "--parallel", "3", "--out", "found"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        ended.set()
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1].endswith("the same command goes on from found") and "Traceback" not in err
