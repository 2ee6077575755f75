"""A peer as a process in an environment of its own, asked over a pipe, one thing at a time.

    python3 -m venv peer && peer/bin/pip install llama-cpp-python
    python -m longspan.bench.model --peer llama.cpp --peer-python peer/bin/python --peer-model model.gguf

The programs beside this file import nothing of ours. Each says one line of JSON when it is ready, then answers each
line of JSON on its standard input with one on its standard output. This file does not know what they are asked.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from longspan.errors import UsageError

PROGRAMS = {"llama.cpp": "llama_cpp.py", "kvpress": "kvpress.py"}
"""Peers, and the program that runs each."""


class Peer:
    """Another engine with a model loaded."""

    def __init__(self, name: str, python: Path, model: Path, arguments: Sequence[str] = ()) -> None:
        """Start it.

        Args:
            name: one of `PROGRAMS`.
            python: the interpreter of the environment it is installed in.
            model: the file or folder it loads.
            arguments: what its program takes after the model.

        Raises:
            UsageError: no such peer or file, or it does not start.
        """
        if name not in PROGRAMS:
            raise UsageError(f"unknown peer {name!r}: use {', '.join(PROGRAMS)}")
        if not python.is_file():
            raise UsageError(f"{python} is no file: give --peer-python the interpreter that {name} is installed for")
        if not model.exists():
            raise UsageError(f"{model} does not exist: give --peer-model what {name} should load")
        self.name = name
        program = Path(__file__).parent / PROGRAMS[name]
        # -P: the program's own folder must not be searched for the library it is named after.
        command = [str(python), "-P", str(program), str(model), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()
        """What it says of itself: its version, and how it runs."""

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer (UsageError: the peer refused it, or ended)."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_answer` tells how it ended
        return self._answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Peer:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise UsageError(f"{self.name} ended with exit status {code}: what it says for itself stands above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UsageError(f"{self.name}: {answer['error']}")
        return answer
