"""Options that are asked for as a group stand in help one by one, and arrive together."""

from __future__ import annotations

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from longspan.cli import options
from longspan.engine.sampler import SamplingParams
from longspan.errors import UsageError


def told(text: str) -> dict[str, str]:
    """Return the options in a help text by their long names, with what is said of them."""
    found: dict[str, str] = {}
    for line in text.partition("Options:")[2].splitlines():
        words = line.split()
        flags = [word for word in words[:2] if word.startswith("--")]
        if line.startswith("  -") and flags:
            name = flags[0]
            found[name] = ""
        elif not line.strip() and found:
            break
        if found:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def test_ask_and_chat_tell_the_same_of_sampling(cli) -> None:
    ask, chat = (told(cli(command, "--help")[1]) for command in ("ask", "chat"))
    for field in dataclasses.fields(options.Sampling):
        flag = f"--{field.name.replace('_', '-')}"
        assert ask[flag] == chat[flag]
        assert len(ask[flag].split()) > 4, "a flag, a metavar and a sentence"
        if field.default is not None:
            assert f"[default: {field.default}]" in ask[flag]
    assert set(ask) - set(chat) == {"--json"} and set(chat) < set(ask)


def run(*arguments: str) -> dict[str, object]:
    got: dict[str, object] = {}

    def command(
        word: str, device: options.Device = "auto", *, sampling: options.Sampling, json: options.AsJson = False
    ) -> None:
        got.update(word=word, device=device, params=sampling.params(), json=json)

    app = typer.Typer()
    app.command()(options.sampled(command))
    result = CliRunner().invoke(app, arguments, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return got


def test_they_arrive_together_with_the_command_s_own() -> None:
    assert run("x") == {"word": "x", "device": "auto", "params": SamplingParams(), "json": False}
    given = "--max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --seed 4 --stop a --stop b --json"
    assert run("x", "--device", "cpu", *given.split()) == {
        "word": "x",
        "device": "cpu",
        "params": SamplingParams(7, 0.5, 0.9, 3, 0.1, seed=4, stop=("a", "b")),
        "json": True,
    }
    with pytest.raises(UsageError, match="top_p"):
        run("x", "--top-p", "2")
