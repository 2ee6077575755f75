"""Ctrl-C put off until pages and the bytes counted for them agree again.

A chunk that is interrupted is taken back, which needs page tables, reference counts and budgets that fit together;
Python raises KeyboardInterrupt between any two lines. It does not make work that takes long: only bookkeeping does.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Undisturbed:
    """A `with` block that Ctrl-C does not enter: it arrives at the block's end."""

    def __init__(self) -> None:
        """Nothing is put off yet."""
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        """Put Ctrl-C off; only the main thread gets it, and only a handler of Python's interrupts anything."""
        if threading.current_thread() is threading.main_thread() and callable(
            before := signal.getsignal(signal.SIGINT)
        ):
            self._before = before
            signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let through what came meanwhile."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._came is not None:
                self._before(*self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame
