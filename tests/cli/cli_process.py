"""How tests start the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

# A test runner started in the background ignores SIGINT, and its children with it, unless they say otherwise.
_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "longspan"
from longspan.cli import main
main()
"""
# The same with its standard input as the controlling terminal, so that Ctrl-C there reaches it.
_ON_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + _START


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longspan.cli", *arguments]


def interruptible(*arguments: str) -> list[str]:
    return [sys.executable, "-c", _START, *arguments]


class Terminal:
    """A program in a pseudo-terminal: type into it, wait for what it shows."""

    def __init__(self, *arguments: str) -> None:
        import pty

        self.end, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ON_TERMINAL, *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(inside)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, wanted: str | Callable[[str], bool], seconds: float = 60.0) -> str:
        """Wait until something is shown; return all since the last time, and begin anew after it."""
        import select

        until = time.monotonic() + seconds
        met = (lambda shown: wanted in shown) if isinstance(wanted, str) else wanted
        while not met(self.shown):
            ready, _, _ = select.select([self.end], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"waited {seconds} s for {wanted!r}, shown: {self.shown!r}"
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
            except OSError as error:  # Linux: the other end was closed
                raise AssertionError(f"ended before {wanted!r}, shown: {self.shown!r}") from error
        # What came in the same piece after the words waited for belongs to the next wait.
        end = self.shown.index(wanted) + len(wanted) if isinstance(wanted, str) else len(self.shown)
        shown, self.shown = self.shown[:end], self.shown[end:]
        return shown

    def finish(self, seconds: float = 60.0) -> int:
        """Wait for its end, reading what it shows so that it never waits for us; return its exit code."""
        import threading

        def drain() -> None:
            try:
                while data := os.read(self.end, 65536):
                    self.shown += data.decode(errors="replace")
            except OSError:
                pass

        thread = threading.Thread(target=drain, daemon=True)
        thread.start()
        try:
            return self.process.wait(seconds)
        finally:
            self.close()
            thread.join(5)

    def close(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.end >= 0:
            os.close(self.end)
            self.end = -1
