"""Ctrl-C: what was read stays, and the next call goes on from there."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
from cli_process import interruptible

from longspan.sessions.journal import DamageError, Journal

STREAMING = ("--attention", "streaming:window=64")


def interrupt_at(process: subprocess.Popen[str], wanted: str) -> str:
    """Send Ctrl-C once a line with `wanted` is on stderr; return all of stderr."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if wanted in line:
            process.send_signal(signal.SIGINT)
            break
    out, rest = process.communicate(timeout=120)
    assert out == ""
    return seen + rest


def test_ctrl_c_while_reading_keeps_what_was_read(home: Path, cli) -> None:
    # Long enough to be still at it when a second line about it has come.
    (home / "long.txt").write_text(" ".join(f"{i * 7919 % 100003}" for i in range(400_000)))
    asked = ["ask", "Who?", *STREAMING, "--session", "long", "--json"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(interruptible(*asked, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("--doc", "long.txt")
    told = interrupt_at(first, "left")
    assert first.returncode == 130, told
    stopped = re.search(r"^longspan: stopped after ([\d,]+) of ([\d,]+) tokens: (.*)$", told, re.MULTILINE)
    assert stopped is not None, told
    assert "Traceback" not in told
    assert stopped[3] == "what was read is saved; go on with --session long"
    done, total = (int(stopped[i].replace(",", "")) for i in (1, 2))
    assert 0 < done < total

    code, out, _ = cli("session", "show", "long", "--json")
    about = json.loads(out)
    assert code == 0
    assert not about["complete"]
    assert 0 <= done - about["tokens_read"] < 100  # the template's head is read, too

    second = start()
    told = interrupt_at(second, "reading: ")
    assert second.returncode == 130
    assert f"reading: {done:,} of {total:,} tokens" in told


@pytest.mark.parametrize("attention", ["streaming:window=64", "retrieval", "dense"])
def test_the_rest_is_read_and_the_answer_is_the_same(
    cli, home: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    from longspan.cli.progress import Progress

    (home / "long.txt").write_text(" ".join(f"{i} bottles of number {i * 7919 % 100003}." for i in range(400)))
    ask = ("ask", "Which number?", "--max-tokens", "5", "--attention", attention, "--json")
    _, out, _ = cli(*ask, "--doc", "long.txt", "--session", "whole")
    whole = json.loads(out)
    cli("session", "rm", "whole", "--yes")  # from which the next would start
    with monkeypatch.context() as patch:

        def interrupted(_: Progress, what: str, done: int, total: int) -> None:
            if done >= 1536:
                raise KeyboardInterrupt

        patch.setattr(Progress, "__call__", interrupted)
        code, out, err = cli(*ask, "--doc", "long.txt", "--session", "part")
    assert (code, out) == (130, "")
    assert "stopped after 1,536 of " in err
    code, out, _ = cli(*ask, "--session", "part")
    part = json.loads(out)
    assert code == 0
    assert part["cached_tokens"] == 1536
    assert part["prompt_tokens"] == whole["prompt_tokens"]
    assert part["answer"] == whole["answer"]
    assert [c["text"] for c in part["citations"]] == [c["text"] for c in whole["citations"]]


def test_without_a_session_it_says_that_nothing_is_saved(cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.cli.progress import Progress

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", interrupted)
    code, out, err = cli("ask", "Who?", "--doc", "minutes.txt")
    assert (code, out) == (130, "")
    assert "nothing is saved" in err
    assert "--session NAME" in err


def committed(place: Path) -> bool:
    try:
        Journal.open(place).close()
    except (DamageError, OSError):
        return False
    return True


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_in_the_answer_keeps_the_session(home: Path, endless_model: Path, cli, as_json: bool) -> None:
    process = subprocess.Popen(
        interruptible(
            *("ask", "Who?", "--doc", "minutes.txt", "--model", str(endless_model), "--max-tokens", "1000000"),
            *("--session", "kept", *STREAMING, *(["--json"] if as_json else [])),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if as_json:
        while b"longspan: read " not in process.stderr.readline():
            pass
        # Being saved comes next, and then the answer: a save that is interrupted would leave nothing, being the first.
        while not committed(home / "sessions" / "kept"):
            assert process.poll() is None
    else:
        assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"stopped" in err
    if as_json:
        assert out == b""
    code, told, _ = cli("session", "show", "kept", "--json")
    assert code == 0
    assert json.loads(told)["complete"]


def test_a_reader_that_leaves_early_ends_it_quietly(home: Path, endless_model: Path) -> None:
    process = subprocess.Popen(
        interruptible("ask", "Who?", "--doc", "minutes.txt", "--model", str(endless_model), "--max-tokens", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(120)
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"rror" not in err
