"""Peers as processes: what they say, and how each way of failing is told."""

import sys
from pathlib import Path

import pytest

from longspan.errors import UsageError
from longspan.peers.process import PROGRAMS, Peer

PYTHON = Path(sys.executable)
ECHO = """
import json, sys
print(json.dumps({"version": "1", "arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("die"):
        sys.exit(7)
    print(json.dumps({"error": "no such press"} if asked.get("refuse") else {"heard": asked}), flush=True)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    program = tmp_path / "echo.py"
    program.write_text(ECHO, encoding="utf-8")
    monkeypatch.setitem(PROGRAMS, "echo", str(program))
    return "echo"


def test_a_peer_says_what_it_is_and_answers_each_question(echo, tmp_path):
    with Peer(echo, PYTHON, tmp_path, ["a", "b"]) as peer:
        assert peer.about == {"version": "1", "arguments": [str(tmp_path), "a", "b"]}
        assert peer.ask({"x": [1, 2]}) == {"heard": {"x": [1, 2]}}
        with pytest.raises(UsageError, match="echo: no such press"):
            peer.ask({"refuse": True})
        assert peer.ask({"x": "ä"}) == {"heard": {"x": "ä"}}, "a refusal ends nothing"


def test_a_peer_that_ends_is_told_with_its_status(echo, tmp_path):
    with Peer(echo, PYTHON, tmp_path) as peer:
        for _ in range(2):
            with pytest.raises(UsageError, match="echo ended with exit status 7"):
                peer.ask({"die": True})


def test_what_can_not_start_is_refused(echo, tmp_path):
    with pytest.raises(UsageError, match=r"unknown peer 'nobody': use llama\.cpp, kvpress"):
        Peer("nobody", PYTHON, tmp_path)
    with pytest.raises(UsageError, match="--peer-python"):
        Peer(echo, tmp_path / "python", tmp_path)
    with pytest.raises(UsageError, match="--peer-model"):
        Peer(echo, PYTHON, tmp_path / "model")


@pytest.mark.parametrize("name", ["llama.cpp", "kvpress"])
def test_programs_exist_and_import_nothing_of_ours(name):
    text = (Path(__file__).parents[2] / "src" / "longspan" / "peers" / PROGRAMS[name]).read_text(encoding="utf-8")
    assert "import longspan" not in text and "from longspan" not in text
