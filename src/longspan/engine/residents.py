"""Sessions held in memory by name, within a quota: those used last stay, others move away and come back when used.

    residents = Residents(llm, memory=8 << 30, host=32 << 30, ttl=3600)
    with residents.using("contracts") as session:
        llm.ask("Who signed it?", session)

What leaves the device is saved first, as one commit under its name. Where a part of host memory is given for it, its
pages lie there as well, until that is full too; from disk they come back page by page (`kv/coming.py`). A session that
is in use never moves. What can't be saved stays where it is: nothing is lost for want of room on a disk. How long a
session is kept on disk was promised when it was saved, and moving it changes nothing of that.
Any number of threads may ask; one session is one thread's at a time, which is for the caller to see to. It does not
know requests or queues.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from longspan.attention import Mechanism
from longspan.engine.contexts import Context
from longspan.engine.llm import LLM
from longspan.engine.making import context_mechanism
from longspan.errors import PoolExhaustedError, SaveError, UsageError
from longspan.sessions.session import Session


@dataclass
class Moves:
    """How often sessions moved, and how often one could not be saved and stayed."""

    to_host: int = 0
    to_disk: int = 0
    from_host: int = 0
    from_disk: int = 0
    stayed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass
class _Resident:
    """One session, and where its memory is."""

    session: Session | None = None
    host: dict[str, Tensor] | None = None
    """What `Context.tensors` returned, in host memory; None: it is on the device, or there is none."""
    mechanism: Mechanism | None = None
    """By what its context attends, and the tokens that this has read, while they are in host memory."""
    tokens: tuple[int, ...] = ()
    pins: int = 0
    moving: bool = False
    used: float = 0.0
    """When it was last let go of."""
    turn: int = 0
    """Greater than that of every session that was used before."""
    changed: bool = False
    """Whether it was in use since it was last saved."""


class Residents:
    """The sessions of one engine that are in memory."""

    def __init__(
        self,
        llm: LLM,
        *,
        memory: int | None = None,
        host: int = 0,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold none yet.

        Args:
            llm: reads and saves them.
            memory: bytes that they may take on the device, as far as none in use takes more; None: no limit.
            host: bytes of host memory for those that leave the device; 0: they go to disk.
            ttl: seconds after its last use at which a session goes to disk; None: only where room is short.
            clock: seconds that never go back.
        """
        for what, value in (("memory", memory), ("host", host), ("ttl", ttl)):
            if value is not None and value < 0:
                raise UsageError(f"{what}={value} of the sessions in memory is below 0: give a number of 0 or more")
        self.llm, self.memory, self.host, self.ttl = llm, memory, host, ttl
        self.moves = Moves()
        self.refused: str | None = None
        """Why a session could not be saved last, in one line."""
        self._clock, self._turn = clock, 0
        self._held: dict[str, _Resident] = {}
        self._lock = threading.Condition()
        self._carrying = threading.Lock()
        """Held by whoever moves a session: the others are used meanwhile."""

    @property
    def names(self) -> list[str]:
        """Names of the sessions in memory, the longest unused first."""
        with self._lock:
            return sorted(self._held, key=lambda name: self._held[name].turn)

    @property
    def nbytes(self) -> int:
        """Bytes that sessions take on the device, free room in their pools included; what forks share counts once."""
        with self._lock:
            sessions = [held.session for held in self._held.values() if held.session is not None]
        sizes: dict[int, int] = {}
        for session in sessions:
            sizes |= _sizes(session.memory)
        return sum(sizes.values())

    @property
    def host_bytes(self) -> int:
        """Bytes that sessions take in host memory, having left the device."""
        with self._lock:
            return sum(_host_bytes(held) for held in self._held.values())

    @contextmanager
    def using(self, name: str) -> Iterator[Session]:
        """Give a session for the length of a `with` block; errors as for `get`."""
        session = self.get(name)
        try:
            yield session
        finally:
            self.release(name)

    def get(self, name: str) -> Session:
        """Return a session, saved or new, which stays in memory until it was let go of as often (`release`).

        Raises as `LLM.session`; PoolExhaustedError: the KV budget does not hold it beside those in use.
        """
        with self._lock:
            held = self._held.setdefault(name, _Resident())
            while held.moving:
                self._lock.wait()
                held = self._held.setdefault(name, _Resident())
            if held.session is not None and held.host is None:
                return self._pinned(held)
            held.moving = True
        there = False
        try:
            with self._carrying:
                self._bring(name, held)
            there = True
        finally:
            with self._lock:
                held.moving = False
                if there:
                    self._pinned(held)
                elif held.session is None:
                    self._held.pop(name, None)
                self._lock.notify_all()
        self.tidy()
        assert held.session is not None, "brought above"
        return held.session

    def release(self, name: str) -> None:
        """Let go of a session: it may move from now on. Others do, where it has grown beyond the quota."""
        with self._lock:
            held = self._held.get(name)
            if held is None or not held.pins:
                raise UsageError(f"session {name!r} is not in use: get it before it is released")
            held.pins -= 1
            held.used = self._clock()
        self.tidy()

    def forget(self, name: str) -> None:
        """Drop a session from memory without saving it: it was removed, say (UsageError: it is in use)."""
        with self._lock:
            while (held := self._held.get(name)) is not None and held.moving:
                self._lock.wait()
            if held is not None and held.pins:
                raise UsageError(f"session {name!r} is in use: wait until its answer is there")
            self._held.pop(name, None)

    def tidy(self) -> None:
        """Move what has not been used for too long, and the longest unused where the quota is passed."""
        now = self._clock()
        while self.ttl is not None and self._move(lambda held: now - held.used > (self.ttl or 0), to_disk=True):
            pass
        while self.memory is not None and self.nbytes > self.memory:
            if not self._move(_on_device):
                break
        while self.host_bytes > self.host:
            if not self._move(lambda held: held.host is not None, to_disk=True):
                break

    def close(self) -> list[str]:
        """Save the sessions and hold none any more; returns those that are in use, or can't be saved (`refused`)."""
        while self._move(lambda held: True, to_disk=True):
            pass
        return self.names

    # --- steps ------------------------------------------------------------------------------------------------

    def _pinned(self, held: _Resident) -> Session:
        assert held.session is not None, "looked at before"
        self._turn += 1
        held.pins, held.turn, held.changed = held.pins + 1, self._turn, True
        return held.session

    def _bring(self, name: str, held: _Resident) -> None:
        """Have a session's memory on the device, others going where the KV budget has no room beside them."""
        saved = held.session is None and self.llm.store.exists(name)
        while True:
            try:
                if held.session is None:
                    held.session = self.llm.session(name)
                    self.moves.from_disk += saved
                elif held.host is not None and held.mechanism is not None:
                    context = self.llm.new_context(held.mechanism)
                    context.restore(held.tokens, held.host)
                    held.session.memory, held.host, held.tokens = context, None, ()
                    self.moves.from_host += 1
                return
            except PoolExhaustedError:
                if not self._moved(_on_device, to_disk=False):
                    raise

    def _move(self, which: Callable[[_Resident], bool], *, to_disk: bool = False) -> bool:
        """Move the longest unused session of these one tier down, or to disk; returns whether one moved."""
        with self._carrying:
            return self._moved(which, to_disk)

    def _moved(self, which: Callable[[_Resident], bool], to_disk: bool) -> bool:
        tried: set[str] = set()
        while True:
            with self._lock:
                free = {name: held for name, held in self._held.items() if not held.pins and not held.moving}
                found = [name for name, held in free.items() if name not in tried and which(held)]
                if not found:
                    return False
                name = min(found, key=lambda each: free[each].turn)
                held = free[name]
                held.moving = True
            gone = False
            try:
                gone = self._carry(name, held, to_disk)
            finally:
                with self._lock:
                    held.moving = False
                    if gone and held.host is None:
                        self._held.pop(name, None)
                    self._lock.notify_all()
            if gone:
                return True
            tried.add(name)

    def _carry(self, name: str, held: _Resident, to_disk: bool) -> bool:
        """Move one session down; returns whether it could be saved."""
        session = held.session
        assert session is not None, "only what is there moves"
        if held.changed and (session.documents or session.turns or self.llm.store.exists(name)):
            try:
                self.llm.save(session)
            except SaveError as error:
                self.moves.stayed, self.refused = self.moves.stayed + 1, str(error)
                return False
        held.changed = False
        memory: Context | None = session.memory
        if not to_disk and memory is not None and self._fits_host(memory):
            held.host = {part: tensor.to("cpu", copy=True) for part, tensor in memory.tensors().items()}
            held.mechanism, held.tokens = context_mechanism(memory), tuple(memory.tokens)
            self.moves.to_host += 1
        else:
            held.host = None
            self.moves.to_disk += 1
        if memory is not None:
            memory.free()
        session.memory = None
        return True

    def _fits_host(self, memory: Context) -> bool:
        """Whether host memory has room; what is still in a file is not read for that."""
        if any(plane.coming is not None for kv in memory._layers() for plane in kv.pool.planes):
            return False
        return 0 < sum(_sizes(memory).values()) <= self.host


def _on_device(held: _Resident) -> bool:
    return held.session is not None and held.session.memory is not None


def _host_bytes(held: _Resident) -> int:
    return 0 if held.host is None else sum(tensor.nbytes for tensor in held.host.values())


def _sizes(memory: Context | None) -> dict[int, int]:
    """Return the bytes of each thing that a context refers to and may share with a fork."""
    if memory is None:
        return {}
    return {id(kv.pool): kv.pool.nbytes for kv in memory._layers()} | memory.beside()
