"""`session`, `models`, `attention`, `version`: tables for people, JSON for programs."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


@pytest.fixture
def saved(cli) -> None:
    code, _, err = cli("ask", "Who?", "--max-tokens", "2", "--doc", "minutes.txt", "--session", "board")
    assert code == 0, err


def test_sessions_are_listed_shown_and_removed(cli, saved: None) -> None:
    code, out, _ = cli("session", "ls", "--json")
    assert code == 0
    (info,) = json.loads(out)
    assert info["name"] == "board"
    assert info["documents"][0]["name"] == "minutes.txt"
    assert info["tokens_read"] == info["tokens"] > 100
    assert info["complete"] is True
    assert info["bytes"] > 1000
    assert info["problem"] is None
    code, out, _ = cli("session", "show", "board", "--json")
    shown = json.loads(out)
    assert [each["commit"] for each in shown.pop("commits")] == [1]
    assert shown == info
    code, out, _ = cli("session", "ls")
    assert "board" in out
    assert "minutes.txt" in out
    code, out, _ = cli("session", "show", "board")
    assert code == 0
    assert f"all of {info['tokens']:,} tokens read" in out

    code, out, err = cli("session", "rm", "board")  # no terminal here to ask at
    assert (code, out) == (2, "")
    assert "--yes" in err
    code, out, _ = cli("session", "rm", "board", "--yes", "--json")
    assert code == 0
    assert json.loads(out) == {"removed": "board"}
    code, out, _ = cli("session", "ls", "--json")
    assert json.loads(out) == []
    code, out, _ = cli("session", "ls")
    assert "No session is saved" in out


def test_how_a_session_is_read_and_kept_is_shown(cli, saved: None) -> None:
    _, out, _ = cli("session", "show", "board", "--json")
    assert (json.loads(out)["prefill"], json.loads(out)["kv"]) == (None, None)
    asked = ("ask", "Who?", "--max-tokens", "2", "--session", "small")
    options = ("--attention", "quest", "--prefill", "xattention", "--kv", "fp8")
    cli(*asked, *options, "--doc", "minutes.txt")
    _, out, _ = cli("session", "show", "small", "--json")
    assert (json.loads(out)["prefill"], json.loads(out)["kv"]) == ("xattention", "fp8")
    _, out, _ = cli("session", "show", "small")
    assert "attention quest, prefill xattention, kv fp8, numbers" in out
    code, _, err = cli(*asked, *options[:-2])
    assert code == 1
    assert 'saved with kv = "fp8", and no kv is asked for' in err


@pytest.mark.parametrize("command", ["show", "rm"])
def test_an_unknown_session_lists_the_known(cli, saved: None, command: str) -> None:
    code, out, err = cli("session", command, "other", "--json", *(["--yes"] if command == "rm" else []))
    assert (code, out) == (1, "")
    assert "choose one of board" in err
    assert len(err.splitlines()) == 1


def test_a_damaged_session_is_listed_and_can_be_removed(cli, saved: None, home: Path) -> None:
    next((home / "sessions" / "board").iterdir()).write_text("{")
    code, out, _ = cli("session", "ls", "--json")
    assert code == 0
    assert "damaged" in json.loads(out)[0]["problem"]
    code, out, err = cli("session", "ls")
    assert code == 0
    assert "damaged" in out
    assert "longspan session rm board" in err
    code, _, _ = cli("session", "show", "board")
    assert code == 1
    code, _, _ = cli("session", "rm", "board", "--yes")
    assert code == 0


def test_names_are_shown_as_they_are(cli, home: Path) -> None:
    (home / "[bold]x :smile:.txt").write_text("Some text. " * 9)
    cli("ask", "Who?", "--max-tokens", "2", "--doc", "[bold]x :smile:.txt", "--session", "odd")
    _, out, _ = cli("session", "ls")
    assert "[bold]x :smile:.txt" in out


def test_models(cli, calibrated: Path) -> None:
    code, out, _ = cli("models", "--json")
    assert code == 0
    told = json.loads(out)
    smollm2 = next(model for model in told["models"] if model["name"] == "smollm2")
    assert smollm2["licence"] == "Apache-2.0"
    assert smollm2["cached"] is False
    assert told["cache"] == str(calibrated)
    assert {each["model"] for each in told["calibrations"]} == {"tiny", "endless"}
    assert all(each["bytes"] > 0 for each in told["calibrations"])
    code, out, _ = cli("models")
    assert code == 0
    assert "smollm2" in out
    assert "retrieval heads of tiny" in out


def test_attention_is_the_registry(cli) -> None:
    from longspan.attention import mechanisms

    code, out, _ = cli("attention", "--json")
    assert code == 0
    told = {each["name"]: each for each in json.loads(out)}
    assert list(told) == list(mechanisms())
    for name, cls in mechanisms().items():
        assert told[name]["options"] == cls.options()
        assert told[name]["exact"] == cls.exact
        assert told[name]["source"] == cls.source
    code, table, _ = cli("attention")
    assert code == 0
    for name, cls in mechanisms().items():
        assert name in table
        assert cls.source in table
        for option, default in cls.options().items():
            assert f"{option}={default}" in table


def test_version(cli) -> None:
    code, out, _ = cli("version", "--json")
    assert code == 0
    told = json.loads(out)
    assert set(told) == {"longspan", "python", "torch", "transformers", "device"}
    assert told["python"] == platform.python_version()
    assert told["torch"] == version("torch")
    code, out, _ = cli("version")
    assert f"transformers {version('transformers')}" in out
    code, out, _ = cli("--version")
    assert out.startswith("longspan ")


COMMANDS = [
    [],
    ["ask"],
    ["chat"],
    ["demo"],
    ["models"],
    ["attention"],
    ["version"],
    ["session"],
    ["session", "ls"],
    ["session", "show"],
    ["session", "rm"],
    ["eval"],
    ["eval", "compare"],
    ["eval", "needle"],
    ["bench"],
    ["bench", "attention"],
    ["bench", "model"],
    ["plan"],
    ["decide"],
    ["cost"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words) or "longspan")
def test_help_has_an_example(cli, words: list[str]) -> None:
    code, out, err = cli(*words, "--help")
    assert code == 0
    assert err == ""
    assert f"Example: longspan {' '.join(words)}".strip() in out


@pytest.mark.parametrize("words", [[], ["session"], ["eval"], ["bench"]])
def test_without_a_command_help_is_shown(cli, words: list[str]) -> None:
    code, out, _ = cli(*words)
    assert code == 0
    assert "Commands:" in out


def test_help_and_version_load_nothing_heavy(home: Path) -> None:
    import subprocess

    heavy = ("torch", "transformers", "numpy", "markitdown", "prompt_toolkit", "rich")
    calls = [[*words, "--help"] for words in COMMANDS] + [["version"], ["session", "ls", "--json"], ["models"]]
    code = (
        "import sys\nfrom longspan.cli import run\n"
        f"for call in {calls!r}: run(call)\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] in ("[]", "['rich']")  # rich draws the table of models
