"""What is being done and how far it is, on standard error: a moving bar on a terminal, a line now and then elsewhere.

It does not know what the work is.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from longspan.cli import output

_BETWEEN_LINES = 5.0
"""Seconds at least between two lines about the same work, where there is no terminal."""


class Progress:
    """Shows one piece of work at a time; called with what is done, how many tokens of how many."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar: Any = None  # rich.progress.Progress
        self._task: Any = None
        self._what = ""
        self._from = 0
        self._since = self._told = 0.0

    def __enter__(self) -> Progress:
        """Show progress from here on."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar away."""
        self.stop()

    def say(self, line: str) -> None:
        """Tell something that stays on the screen."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            output.say(line if sys.stderr.isatty() else f"longspan: {line}")

    def busy(self, what: str) -> None:
        """Tell what is being done, where nobody knows how long it takes."""
        self._what = ""
        if sys.stderr.isatty():
            self._show(what, None, 0, "")

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell what is being done and how many tokens of how many are done."""
        now = time.perf_counter()
        if what != self._what:
            self._what, self._from, self._since, self._told = what, done, now, 0.0
        detail = f"{done:,} of {total:,} tokens"
        if done > self._from and now > self._since:
            speed = (done - self._from) / (now - self._since)
            detail += f", {speed:,.0f} tokens/s, {_clock((total - done) / speed)} left"
        if sys.stderr.isatty():
            self._show(what, total, done, detail)
        elif done < total and now - self._told > _BETWEEN_LINES:
            self._told = now
            self.say(f"{what}: {detail}")

    def stop(self) -> None:
        """Take the bar away, so that other text can be written."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _show(self, what: str, total: int | None, done: int, detail: str) -> None:
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.start()
        if self._task is not None and self._bar.tasks[-1].total != total:
            self._bar.remove_task(self._task)
            self._task = None
        if self._task is None:
            self._task = self._bar.add_task(what, total=total, completed=done, detail=detail)
        else:
            self._bar.update(self._task, description=what, completed=done, detail=detail)


def _make_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    class Known(BarColumn):
        """A bar where the end is known, nothing where it is not."""

        def render(self, task: Any) -> Any:
            return "" if task.total is None else super().render(task)

    return Bar(
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        Known(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        # The stream itself, for loading a model redirects sys.stderr for a while.
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _clock(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
