"""Pages below the device that are brought up before they are read, by one thread.

What is wanted stands in a queue of bounded length, and what was brought up is a bounded number of bytes: the oldest
goes first. Nothing depends on it: a page that is not here is read from where it lies. A page's bytes below never change
while it is referred to, so that a copy can't be stale; whoever gives a slot up says so (`forget`).
On a GPU the thread copies through pinned memory on a stream of its own, and readers wait for its event.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from longspan.kv.traffic import Traffic

WAITING = 256
"""Requests that stand in the queue; more are dropped."""
STAGED = 64 << 20
"""Bytes that are held of what was brought up."""
_BATCH = 16
"""Pages of one request that are copied together."""


class Source(Protocol):
    """Where pages lie."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether they are read on a GPU."""
        ...

    def load(self, slots: Sequence[int]) -> Tensor:
        """Return the bytes of pages `[n, page_bytes]`, on the device of whoever reads them."""
        ...


@dataclass
class _Staged:
    """A page that is wanted, being copied, or here."""

    done: threading.Event = field(default_factory=threading.Event)
    record: Tensor | None = None
    ready: torch.cuda.Event | None = None


class Prefetcher:
    """One thread, started when something is first wanted."""

    def __init__(self, traffic: Traffic, waiting: int = WAITING, staged: int = STAGED) -> None:
        """Start with nothing wanted."""
        self.traffic, self.most = traffic, staged
        self._queue: queue.Queue[tuple[Source, list[int]] | None] = queue.Queue(waiting)
        self._pages: OrderedDict[tuple[int, int], _Staged] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def want(self, source: Source, slots: Sequence[int]) -> None:
        """Bring pages up when there is time; some, or none, where much is wanted already."""
        with self._lock:
            new = [slot for slot in slots if (id(source), slot) not in self._pages]
            self._shrink(source.page_bytes, len(new))
            new = new[: max(0, self.most - self._bytes) // source.page_bytes]
            for start in range(0, len(new), _BATCH):
                batch = new[start : start + _BATCH]
                try:
                    self._queue.put_nowait((source, batch))
                except queue.Full:
                    break
                for slot in batch:
                    self._pages[id(source), slot] = _Staged()
                    self._bytes += source.page_bytes
            if new and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="longspan-prefetch", daemon=True)
                self._thread.start()

    def take(self, source: Source, slots: Sequence[int], *, counted: bool = True) -> dict[int, Tensor]:
        """Return the bytes of those of these pages that were brought up, waiting for those that are on their way.

        Args:
            source: where they lie.
            slots: of the pages.
            counted: whether hits, waits and misses are counted.
        """
        with self._lock:
            found = {slot: self._pages.get((id(source), slot)) for slot in slots}
        out, late, now = {}, 0, 0
        for slot, staged in found.items():
            if staged is None:
                continue
            waited = not staged.done.is_set()
            staged.done.wait()
            if staged.record is None:  # it could not be read: the reader meets the fault itself
                continue
            late, now = late + waited, now + (not waited)
            if staged.ready is not None:
                torch.cuda.current_stream().wait_event(staged.ready)
                staged.record.record_stream(torch.cuda.current_stream())
            out[slot] = staged.record
        if counted:
            self.traffic.read(now, late, len(found) - now - late)
        return out

    def forget(self, source: Source, slots: Iterable[int]) -> None:
        """Drop pages whose slots hold others from now on."""
        with self._lock:
            for slot in slots:
                if self._pages.pop((id(source), slot), None) is not None:
                    self._bytes -= source.page_bytes

    def close(self) -> None:
        """End the thread, once it has done what it is at."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._lock:
                self._pages.clear()
                self._bytes = 0
            self._queue.put(None)
            thread.join()

    def _shrink(self, page_bytes: int, coming: int) -> None:
        """Drop the oldest pages that are here already, until so many more may be held."""
        for key in [key for key, staged in self._pages.items() if staged.done.is_set()]:
            if self._bytes + coming * page_bytes <= self.most:
                break
            del self._pages[key]
            self._bytes -= page_bytes

    def _work(self) -> None:
        stream: torch.cuda.Stream | None = None
        while (wanted := self._queue.get()) is not None:
            source, slots = wanted
            with self._lock:
                pages = {slot: self._pages.get((id(source), slot)) for slot in slots}
            still = [slot for slot, staged in pages.items() if staged is not None]
            records: Tensor | None = None
            ready: torch.cuda.Event | None = None
            try:
                if still:
                    if source.on_gpu and stream is None:
                        stream = torch.cuda.Stream()
                    with torch.cuda.stream(stream if source.on_gpu else None):
                        records = source.load(still)
                        if source.on_gpu:
                            ready = torch.cuda.Event()
                            ready.record()
            except Exception:  # who reads the page meets the fault itself
                records = None
            for i, slot in enumerate(still):
                staged = pages[slot]
                assert staged is not None, "only pages that are wanted are loaded"
                staged.record, staged.ready = None if records is None else records[i], ready
            for staged in pages.values():
                if staged is not None:
                    staged.done.set()
