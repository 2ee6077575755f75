"""Programs in processes of their own that are asked over a pipe, one thing at a time: peers, and copies of ours.

    python3 -m venv peer && peer/bin/pip install llama-cpp-python
    python -m longspan.bench.model --peer llama.cpp --peer-python peer/bin/python --peer-model model.gguf

Each says one line of JSON when it is ready, then answers each line of JSON on its standard input with one on its
standard output. Peers run in environments of their own: their programs, beside this file, import nothing of ours. This
file does not know what they are asked.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from longspan.errors import UsageError

PROGRAMS = {"llama.cpp": "llama_cpp.py", "kvpress": "kvpress.py"}
"""Peers, and the program that runs each."""


class Program:
    """A process that answers."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it, and wait for nothing: several get ready side by side.

        Args:
            name: what it is called where it fails.
            command: with all arguments.
            environment: variables set beside this process's own.
        """
        self.name = name
        own = os.environ | (environment or {})
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What it says of itself once it is ready: its version, and how it runs (UsageError: it does not start)."""
        return self._answer()

    @property
    def ended(self) -> bool:
        """Whether it ended, and answers nothing more."""
        return self._process.poll() is not None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Send a question and wait for its answer (UsageError: the program refused it, or ended)."""
        assert self.about is not None and self._process.stdin is not None
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

    def __enter__(self) -> Self:
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


class Peer(Program):
    """Another engine with a model loaded."""

    def __init__(self, name: str, python: Path, model: Path, arguments: Sequence[str] = ()) -> None:
        """Start it.

        Args:
            name: one of `PROGRAMS`.
            python: the interpreter of the environment it is installed in.
            model: the file or folder it loads.
            arguments: what its program takes after the model.

        Raises:
            UsageError: no such peer or file.
        """
        if name not in PROGRAMS:
            raise UsageError(f"unknown peer {name!r}: use {', '.join(PROGRAMS)}")
        if not python.is_file():
            raise UsageError(f"{python} is no file: give --peer-python the interpreter that {name} is installed for")
        if not model.exists():
            raise UsageError(f"{model} does not exist: give --peer-model what {name} should load")
        program = Path(__file__).parent / PROGRAMS[name]
        # -P: the program's own folder must not be searched for the library it is named after.
        super().__init__(name, [str(python), "-P", str(program), str(model), *arguments])
