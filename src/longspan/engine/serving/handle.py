"""The events of one request, from the engine's thread to whoever asked, in a thread or in an event loop.

Events wait here until they are taken; an answer is bounded, and so is what waits. It does not know what is told.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from longspan.engine.serving.events import Done, Event


class Wakes:
    """Event loops that are told once of all that came for them: to wake one takes as long as to make a token."""

    def __init__(self) -> None:
        """Start with none."""
        self._lock = threading.Lock()
        self._due: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Event, Callable[[], None]]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, came: asyncio.Event, gone: Callable[[], None]) -> None:
        """Have an event set with the next `flush`; `gone` is called if its loop is closed by then."""
        with self._lock:
            self._due.setdefault(loop, []).append((came, gone))

    def flush(self) -> None:
        """Wake every loop that something came for."""
        if not self._due:
            return
        with self._lock:
            due, self._due = self._due, {}
        for loop, waiting in due.items():
            try:
                loop.call_soon_threadsafe(_set, [came for came, _ in waiting])
            except RuntimeError:  # the loop is closed: nobody reads any more
                for _, gone in waiting:
                    gone()


def _set(events: list[asyncio.Event]) -> None:
    for came in events:
        came.set()


class Handle(Iterator[Event], AsyncIterator[Event]):
    """A request under way: iterate over its events, with `for` or `async for`; one reader at a time.

    The last event of each choice is `Done`. What goes wrong is raised as a `LongspanError`.
    """

    def __init__(self, cancel: Callable[[], None], choices: int, wakes: Wakes) -> None:
        """Take what stops the request, how many choices end it, and where event loops are woken."""
        self._cancel, self._left, self._wakes = cancel, choices, wakes
        self._events: deque[Event | BaseException] = deque()
        self._there = threading.Condition()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._closed = False

    # --- whoever asked ---------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop the request wherever it is; what a session has read stays. Choices under way end as `cancelled`."""
        self._cancel()

    def __next__(self) -> Event:
        """Wait for the next event."""
        with self._there:
            while not self._events:
                if self._closed or self._left <= 0:
                    raise StopIteration
                self._there.wait()
            return self._taken()

    async def __anext__(self) -> Event:
        """Wait for the next event without holding up the event loop."""
        while True:
            with self._there:
                if self._events:
                    return self._taken()
                if self._closed or self._left <= 0:
                    raise StopAsyncIteration
                if self._waiting is None:
                    self._waiting = asyncio.get_running_loop(), asyncio.Event()
                came = self._waiting[1]
                came.clear()
            await came.wait()

    def __iter__(self) -> Handle:
        """Return itself."""
        return self

    def __aiter__(self) -> Handle:
        """Return itself."""
        return self

    def _taken(self) -> Event:
        event = self._events.popleft()
        if isinstance(event, BaseException):
            self._closed = True
            raise event
        if isinstance(event, Done):
            self._left -= 1
        return event

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def put(self, event: Event | BaseException) -> None:
        """Tell an event, or raise an error where events are taken; an event loop learns of it by `Wakes.flush`."""
        with self._there:
            first = not self._events
            self._events.append(event)
            self._there.notify()
            waiting = self._waiting
        if first and waiting is not None:
            self._wakes.add(*waiting, self._cancel)
