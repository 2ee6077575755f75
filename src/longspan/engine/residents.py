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
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longspan.engine.contexts import Context
from longspan.engine.llm import LLM
from longspan.engine.resident import Moves, Resident, fits, sizes
from longspan.errors import PoolExhaustedError, SaveError, UsageError
from longspan.sessions.session import Session


class Residents:
    """The sessions of one engine that are in memory."""

    def __init__(
        self,
        llm: LLM,
        *,
        memory: int | None = None,
        host: int = 0,
        count: int | None = None,
        ttl: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold none yet.

        Args:
            llm: reads and saves them.
            memory: bytes that they may take on the device, as far as none in use takes more; None: no limit.
            host: bytes of host memory for those that leave the device; 0: they go to disk.
            count: sessions on the device and in host memory together, as far as no more are in use; None: no limit.
            ttl: seconds after its last use at which a session goes to disk; None: only where room is short.
            clock: seconds that never go back.
        """
        for what, value in (("memory", memory), ("host", host), ("count", count), ("ttl", ttl)):
            if value is not None and value < 0:
                raise UsageError(f"{what}={value} of the sessions in memory is below 0: give a number of 0 or more")
        self.llm, self.memory, self.host, self.count, self.ttl = llm, memory, host, count, ttl
        self.moves = Moves()
        self.refused: str | None = None
        """Why a session could not be saved last, in one line."""
        self._clock, self._turn = clock, 0
        self._held: dict[str, Resident] = {}
        self._lock = threading.Condition()
        self._carrying = threading.Lock()
        """Held by whoever moves a session: the others are used meanwhile."""

    def __len__(self) -> int:
        """Return how many sessions are in memory."""
        return len(self._held)

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
        found: dict[int, int] = {}
        for session in sessions:
            found |= sizes(session.memory)
        return sum(found.values())

    @property
    def host_bytes(self) -> int:
        """Bytes that sessions take in host memory, having left the device."""
        with self._lock:
            return sum(held.host_bytes for held in self._held.values())

    @property
    def host_pages(self) -> Counter[str]:
        """How many pages lie in host memory, by format."""
        with self._lock:
            return sum((held.pages for held in self._held.values() if held.host is not None), Counter[str]())

    @property
    def contexts(self) -> list[Context]:
        """What the sessions on the device remember."""
        with self._lock:
            found = [held.session.memory for held in self._held.values() if held.session is not None]
        return [memory for memory in found if memory is not None]

    @property
    def due(self) -> float | None:
        """Seconds until `tidy` has something to do because of time; None: it has not."""
        if self.ttl is None:
            return None
        with self._lock:
            left = [self.ttl - (self._clock() - held.used) for held in self._held.values() if not held.pins]
        return max(0.0, min(left)) if left else None

    def peek(self, name: str) -> Session | None:
        """Return a session that is in memory, wherever it lies, to be looked at alone; None: it is not."""
        with self._lock:
            held = self._held.get(name)
            return None if held is None else held.session

    @contextmanager
    def using(self, name: str) -> Iterator[Session]:
        """Give a session for the length of a `with` block; errors as for `get`."""
        session = self.get(name)
        try:
            yield session
        finally:
            self.release(name)

    def get(self, name: str, *, make: bool = True) -> Session:
        """Return a session, saved or new, which stays in memory until it was let go of as often (`release`).

        Args:
            name: of the session.
            make: whether it may be a new one (SessionNotFoundError: there is none).

        Raises as `LLM.session`; PoolExhaustedError: the KV budget does not hold it beside those in use.
        """
        with self._lock:
            while (held := self._held.get(name)) is not None and held.moving:
                self._lock.wait()
            if held is None and not make:
                self.llm.store.existing(name)
            held = self._held.setdefault(name, Resident())
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

    def release(self, name: str, *, changed: bool = True) -> None:
        """Let go of a session: it may move from now on. Others do, where it has grown beyond the quota.

        Args:
            name: of the session.
            changed: whether it may be another than it was; where it is not, it need not be saved again to move.
        """
        with self._lock:
            held = self._held.get(name)
            if held is None or not held.pins:
                raise UsageError(f"session {name!r} is not in use: get it before it is released")
            held.pins -= 1
            held.changed |= changed
            held.used = self._clock()
        self.tidy()

    def hold(self, session: Session) -> None:
        """Take a session that was made elsewhere and is saved as it stands: a fork, say (UsageError: it is held)."""
        assert session.name is not None, "only a session with a name is held"
        with self._lock:
            if session.name in self._held:
                raise UsageError(f"session {session.name!r} is in memory already: forget it first")
            self._turn += 1
            self._held[session.name] = Resident(session, used=self._clock(), turn=self._turn)
        self.tidy()

    def save(self, name: str) -> None:
        """Save a session that is in memory and may be another than the one that is saved.

        Raises:
            SaveError: it could not be; it is in memory as before.
        """
        with self._lock:
            while (held := self._held.get(name)) is not None and held.moving:
                self._lock.wait()
            if held is None or held.session is None or not held.changed:
                return
            held.pins, held.changed = held.pins + 1, False  # what changes while it is saved is saved the next time
        saved = False
        try:
            self.llm.save(held.session)
            saved = True
        finally:
            with self._lock:
                held.pins -= 1
                held.changed |= not saved

    def change(self, name: str) -> None:
        """Note that a session in memory is another than the one that is saved."""
        with self._lock:
            if (held := self._held.get(name)) is not None:
                held.changed = True

    def forget(self, name: str) -> None:
        """Drop a session from memory without saving it: it was removed, say (UsageError: it is in use)."""
        with self._lock:
            while (held := self._held.get(name)) is not None and held.moving:
                self._lock.wait()
            if held is not None and held.pins:
                raise UsageError(f"session {name!r} is in use: wait until its answer is there")
            self._held.pop(name, None)
        if held is not None and held.session is not None and held.session.memory is not None:
            held.session.memory.free()
            held.session.memory = None

    def shrink(self, *, but: str | None = None) -> bool:
        """Have the longest unused session leave the device, another than `but`; returns whether one did."""
        return self._move(lambda held: held.on_device and held is not self._held.get(but or ""))

    def tidy(self) -> None:
        """Move what has not been used for too long, and the longest unused where the quota is passed."""
        now = self._clock()
        while self.ttl is not None and self._move(lambda held: now - held.used >= (self.ttl or 0), to_disk=True):
            pass
        while self.count is not None and len(self._held) > self.count:
            if not self._move(lambda held: True, to_disk=True):
                break
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

    def _pinned(self, held: Resident) -> Session:
        assert held.session is not None, "looked at before"
        self._turn += 1
        held.pins, held.turn = held.pins + 1, self._turn
        return held.session

    def _bring(self, name: str, held: Resident) -> None:
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
                    held.session.memory = context
                    held.off_host()
                    self.moves.from_host += 1
                return
            except PoolExhaustedError:
                if not self._moved(_on_device, to_disk=False):
                    raise

    def _move(self, which: Callable[[Resident], bool], *, to_disk: bool = False) -> bool:
        """Move the longest unused session of these one tier down, or to disk; returns whether one moved."""
        with self._carrying:
            return self._moved(which, to_disk)

    def _moved(self, which: Callable[[Resident], bool], to_disk: bool) -> bool:
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

    def _carry(self, name: str, held: Resident, to_disk: bool) -> bool:
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
        if not to_disk and memory is not None and fits(memory, self.host):
            held.to_host(memory)
            self.moves.to_host += 1
        else:
            held.off_host()
            self.moves.to_disk += 1
        if memory is not None:
            memory.free()
        session.memory = None
        return True


def _on_device(held: Resident) -> bool:
    return held.on_device
