"""`longspan chat`: from a pipe and in a terminal."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import Terminal, command

FEW = ("--max-tokens", "4")
PROMPT = "\x1b[?2004h"  # bracketed paste is switched on: the prompt reads keys from here on


def test_over_a_pipe(longspan, home: Path) -> None:
    (home / "more.txt").write_text("The ferry to Riga leaves at nine. " * 5)
    lines = [
        "",
        "/help",
        "Who keeps the key?",
        "/doc more.txt",
        "/doc minutes.txt",
        "/doc gone.txt",
        "/dance",
        "/save",
        "When?",
        "/stats",
    ]
    lines += ["/save talk", "/quit", "never asked"]
    done = longspan("chat", "--doc", "minutes.txt", *FEW, stdin="\n".join(lines).encode())
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert "/doc PATH" in out
    assert out.count("Passages it rests on:") == 2
    assert "more.txt, characters" in out
    assert "2 documents" in out
    assert "2 questions remembered" in out
    assert "saved as talk" in out
    assert err.count("nothing new: the session holds it already") == 1
    assert "gone.txt: there is no such file" in err
    assert "unknown command /dance: use /help, /doc" in err
    assert "the session has no name yet: /save NAME" in err
    assert "Traceback" not in err
    assert "\x1b" not in out + err


def test_a_named_session_keeps_the_conversation(longspan, cli) -> None:
    first = longspan("chat", "--session", "talk", "--doc", "minutes.txt", *FEW, stdin=b"Who?\nWhere?")
    assert first.returncode == 0, first.stderr
    second = longspan("chat", "--session", "talk", *FEW, stdin=b"When?\n/stats\n")
    assert second.returncode == 0, second.stderr
    assert b"1 documents" not in second.stdout
    assert b"3 questions remembered" in second.stdout
    _, out, _ = cli("session", "show", "talk", "--json")
    assert json.loads(out)["turns"] == 3


def test_a_document_that_can_not_be_kept_fails_no_later_question(longspan, home: Path) -> None:
    (home / "long.txt").write_text("The ferry to Riga leaves at nine. " * 60)
    lines = ["/doc long.txt", "Who keeps the key?", "/stats", "/save talk"]
    kept = ("--attention", "quest", "--kv-budget", "150KB")
    done = longspan("chat", "--doc", "minutes.txt", *kept, *FEW, stdin="\n".join(lines).encode())
    out, err = done.stdout.decode(), done.stderr.decode()
    assert err.count("raise it (--kv-budget)") == 1, err
    assert "1 document," in out and "1 question remembered" in out and "saved as talk" in out
    assert longspan("ask", "Who?", "--session", "talk", *kept, *FEW).returncode == 0


def test_without_documents_it_just_talks(longspan) -> None:
    done = longspan("chat", *FEW, stdin=b"Hello\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert b"Passages" not in done.stdout


def test_saving_never_replaces_another_session(longspan, cli) -> None:
    longspan("chat", "--session", "old", "--doc", "minutes.txt", *FEW, stdin=b"Who?\n")
    done = longspan("chat", *FEW, stdin=b"Hello\n/save old\n/save new\n")
    assert done.returncode == 0
    assert b"'old' is saved already" in done.stderr
    assert b"saved as new" in done.stdout
    _, out, _ = cli("session", "show", "old", "--json")
    assert len(json.loads(out)["documents"]) == 1


def test_standard_input_can_not_be_both(longspan) -> None:
    done = longspan("chat", "--doc", "-", stdin=b"text")
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"chat reads questions from standard input" in done.stderr


@pytest.mark.parametrize("words", [["chat"], ["session", "rm", "talk"]])
def test_a_closed_standard_input_is_told(home: Path, longspan, words: list[str]) -> None:
    longspan("chat", "--session", "talk", *FEW, stdin=b"Who?\n")
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command(*words)]
    done = subprocess.run(closed, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert (b"there is no standard input" if words == ["chat"] else b"--yes") in done.stderr
    assert b"internal error" not in done.stderr


def test_a_conversation_that_can_not_be_saved_is_told_before_it_begins(longspan, home: Path) -> None:
    (home / "sessions").write_text("a file where the folder should be")
    done = longspan("chat", "--session", "talk", *FEW, stdin=b"Who?\n")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"can't save session 'talk'" in done.stderr and b"LONGSPAN_SESSIONS" in done.stderr


@pytest.fixture
def terminal(home: Path, endless_model: Path) -> Iterator[Terminal]:
    pytest.importorskip("termios")
    started = Terminal(
        *("chat", "--doc", "minutes.txt", "--model", str(endless_model), "--max-tokens", "1000000"),
        *("--attention", "streaming:window=64"),
    )
    yield started
    started.close()


def test_in_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal, home: Path) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("/stats\r")
    terminal.wait_for("1 document, ")
    terminal.wait_for(PROMPT)
    terminal.type("Who keeps the key?\r")
    terminal.wait_for("key?")
    terminal.wait_for(lambda shown: len(shown) > 500)  # it writes and would not stop
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for(PROMPT)
    terminal.type("half a line\x03")  # clears the line
    terminal.wait_for("leaves)")
    terminal.wait_for(PROMPT)
    terminal.type("/stats\r")
    terminal.wait_for("0 questions remembered")
    terminal.wait_for(PROMPT)
    terminal.type("\x04")
    assert terminal.finish() == 0
    history = home / "state" / "longspan" / "chat_history"
    assert "Who keeps the key?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_in_a_terminal_ctrl_c_twice_leaves(terminal: Terminal) -> None:
    terminal.wait_for(PROMPT)
    terminal.type("\x03")
    terminal.wait_for("leaves)")
    terminal.wait_for(PROMPT)
    terminal.type("\x03")
    assert terminal.finish() == 0
