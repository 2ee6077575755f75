"""Keeping a folder of sessions in order: every bit looked at, what nobody needs removed, quotas and times obeyed.

What was promised to be kept is never removed here. A clock that was set back makes nothing older: a time that lies
ahead counts as now. Which of two commits is newer is told by their numbers, never by a clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.errors import SaveError, SessionCorruptError, SessionError, SessionNotFoundError
from longspan.sessions import files, legacy, records, stored
from longspan.sessions.catalogue import Row
from longspan.sessions.journal import DamageError, last_segment, segments
from longspan.sessions.records import BrokenError, LaterError

if TYPE_CHECKING:
    from longspan.sessions.store import SessionInfo, SessionStore

_STEP = 1 << 20


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file: which, and the byte at which it begins, where it has one."""

    session: str | None
    file: str
    byte: int | None
    what: str
    harmless: bool = False
    """Whether nothing that was committed is touched: what an interrupted save left, say."""

    def line(self) -> str:
        """Return it in one line."""
        at = "" if self.byte is None else f" at byte {self.byte:,}"
        whose = "" if self.session is None else f"session {self.session!r}: "
        return f"{whose}{self.file}{at}: {self.what}"


@dataclass
class Collected:
    """What a collection removed."""

    files: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    """Those that were not kept and whose time was over, or for which there was no room."""
    freed: int = 0
    """Bytes."""
    compacted: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


# --- verify ---------------------------------------------------------------------------------------------------


def verify(store: SessionStore, name: str | None = None) -> list[Problem]:
    """Read every byte of a session, or of all and of the catalogue, and return what is wrong.

    Raises SessionNotFoundError, UsageError: there is no such session; SessionError: the disk refuses.
    """
    if name is not None:
        store.show(name) if not store.exists(name) else None
        return _session(store, name)
    # The catalogue first: whatever opens it after that puts it together anew where it is damaged.
    try:
        found = [Problem(None, str(store.catalogue.path), None, line) for line in store.catalogue.problems()]
    except OSError as error:
        raise SessionError(f"{error}; free some space, or try again when no other process holds it") from error
    return found + [problem for each in store.names() for problem in _session(store, each)]


def verify_file(path: Path) -> list[Problem]:
    """Read every byte of a segment that stands alone, an exported session say, and return what is wrong (OSError)."""
    return list(_segment(None, path, None))


def _session(store: SessionStore, name: str) -> list[Problem]:
    folder = store.folder(name)
    try:
        last = last_segment(folder)
        if last is None and legacy.is_old(folder):
            return [Problem(name, str(folder), None, line) for line in legacy.problems(folder, name)]
        bounds, found = _bounds(last), []
        for path in sorted(segments(folder)):
            if path == last or path.name in bounds:
                found += list(_segment(name, path, None if path == last else bounds[path.name]))
        missing = [file for file in bounds if not (folder / file).exists()]
        found += [Problem(name, str(folder / file), None, "is missing") for file in missing]
        if not any(not problem.harmless for problem in found):
            # What no single record shows: rows that a commit needs and that are not there, a commit that was lost.
            found += _whole(store, name)
    except OSError as error:
        raise SessionError(f"session {name!r} can't be read ({error}): make its files readable to you") from error
    return found


def _whole(store: SessionStore, name: str) -> list[Problem]:
    try:
        journal, manifest, path = store.opened(name, store.folder(name))
        stored.sources_of(journal, manifest)
        row = store.catalogue.row(name)
        if row is not None and (row.file, row.end) == (path.name, journal.end) and _differs(row, manifest.told()):
            return [Problem(name, str(store.catalogue.path), None, "tells of a session what its journal does not")]
        if row is not None and store.catalogue.prefixes(name) != stored.read_chain(journal, manifest):
            return [Problem(name, str(store.catalogue.path), None, "holds other prefixes than the session's journal")]
    except SessionNotFoundError:
        return []  # removed meanwhile
    except DamageError as error:
        return [Problem(name, str(error.path), error.at, str(error))]
    except SessionCorruptError as error:
        return [Problem(name, str(store.folder(name)), None, str(error))]
    return []


def _differs(row: Row, told: dict[str, Any]) -> bool:
    keys = ("created", "saved", "kept", "ttl", "identity", "state")
    return any(getattr(row, key) != told[key] for key in keys)


def _bounds(last: Path | None) -> dict[str, int]:
    """Return which segments the last one follows, and how much of each belongs to the session."""
    if last is None:
        return {}
    handle = files.open_to_read(last)
    try:
        return dict(records.decode_head(records.decode(partial(files.read_at, handle), 0, None))[1])
    except (BrokenError, LaterError):
        return {}
    finally:
        os.close(handle)


def _segment(name: str | None, path: Path, stop: int | None) -> Iterator[Problem]:
    """Yield what is wrong with a segment: its records, their rows, and the zeros between."""
    handle = files.open_to_read(path)
    try:
        read, size = partial(files.read_at, handle), os.fstat(handle).st_size
        if stop is not None and size < stop:
            yield Problem(name, str(path), None, f"has {size:,} bytes, and {stop:,} were committed")
        end = size if stop is None else min(stop, size)
        try:
            head = records.decode(read, 0, None)
            salt, _ = records.decode_head(head)
        except LaterError as error:
            yield Problem(name, str(path), 0, f"{error}: update longspan")
            return
        except BrokenError as error:
            yield Problem(name, str(path), error.at, str(error))
            return
        at = committed = 0
        while at < end:
            try:
                record = records.decode(read, at, salt)
                if record.end > end:
                    raise BrokenError(at, "is cut short")
            except BrokenError as error:
                after = _next(read, at + records.ALIGNED, end, salt)
                if after is None and stop is None and committed == at:
                    what = (
                        f"{end - at:,} bytes behind the last commit: an interrupted save left them, or damage a commit"
                    )
                    yield Problem(name, str(path), at, what, harmless=True)
                    return
                yield Problem(name, str(path), at, str(error))
                if after is None:
                    return
                at = after
                continue
            yield from _record(name, path, handle, record)
            at = record.end
            committed = at if record.kind == records.COMMIT else committed
        if stop is None and committed < at:
            yield Problem(
                name, str(path), committed, f"{at - committed:,} bytes that no commit followed", harmless=committed > 0
            )
    finally:
        os.close(handle)


def _record(name: str | None, path: Path, handle: int, record: records.Record) -> Iterator[Problem]:
    """Yield what is wrong with the data of a record whose header and meta are whole, and with the zeros in it."""
    meta_end = record.at + records.ALIGNED + len(record.meta)
    gaps = [(meta_end, record.data_at), (record.data_at + record.data_bytes, record.end)]
    for start, stop in gaps:
        if stop > start and any(files.read_at(handle, stop - start, start)):
            yield Problem(name, str(path), start, "fails its checksum: what stands between records is not zero")
    if record.kind == records.ROWS:
        try:
            rows = records.decode_rows(record)
        except BrokenError as error:
            yield Problem(name, str(path), record.at, str(error))
            return
        at = record.data_at
        for number, size, checksum in zip(rows.numbers, rows.sizes, rows.checksums, strict=True):
            data = files.read_at(handle, size, at)
            if len(data) < size:
                buffer = bytearray(size)
                files.read_into(handle, memoryview(buffer), at)
                data = bytes(buffer)
            if records.checksum(data) != checksum:
                stream = " ".join(part for part in rows.stream if part)
                yield Problem(name, str(path), at, f"row {number} of {stream} fails its checksum")
            at += size


def _next(read: records.Read, start: int, end: int, salt: int) -> int | None:
    """Return where the next whole record begins."""
    while start < end:
        piece = read(min(_STEP, end - start), start)
        found = piece.find(records.MAGIC)
        while found >= 0:
            if (start + found) % records.ALIGNED == 0:
                with suppress(BrokenError, LaterError):
                    if records.decode(read, start + found, salt).end <= end:
                        return start + found
            found = piece.find(records.MAGIC, found + 1)
        start += _STEP
    return None


# --- collection -----------------------------------------------------------------------------------------------


def collect(store: SessionStore, quota: int | None = None, now: float | None = None) -> Collected:
    """Remove what nobody needs: what crashes left, sessions whose time is over, and for a quota the longest unused.

    Args:
        store: whose folder.
        quota: bytes on disk; None: the store's.
        now: seconds since 1970; None: the clock's.

    Raises SessionError if the folder can't be listed.
    """
    done, quota = Collected(), store.quota if quota is None else quota
    if not store.root.is_dir():
        return done
    with suppress(OSError):  # what can't be looked at now is not known to be damaged
        if store.catalogue.problems():
            store.catalogue.remove()
            done.files.append(str(store.catalogue.path))
    _leftovers(store, done)
    for name in store.names():
        with suppress(BlockingIOError), store.lock(name, wait=False):
            _tidy(store, name, done)
    for name in store.catalogue.names() - set(store.names()):
        store.catalogue.drop(name)
    infos = [info for info in store.infos() if info.problem is None]
    for info in infos:
        if not info.kept and info.ttl is not None and _age(info, now) > info.ttl:
            _give_up(store, info, done)
    if quota is not None:
        _shrink(store, quota, done, now)
    return done


def make_room(store: SessionStore, name: str, needed: int, quota: int) -> None:
    """Remove sessions that are not kept, the longest unused first, until so many bytes fit the quota.

    Raises SaveError where those that are kept leave no room for them.
    """
    if used(store) + needed <= quota:
        return
    _shrink(store, quota - needed, Collected(), None, {name})
    held = used(store)
    if held + needed > quota:
        raise SaveError(
            f"can't save session {name!r}: it needs up to {files.size(needed)}, and of the quota of "
            f"{files.size(quota)} kept sessions take {files.size(held)}; raise LONGSPAN_SESSIONS_QUOTA or remove one "
            "(longspan session ls); what was saved before is untouched"
        )


def used(store: SessionStore) -> int:
    """Return the bytes that all sessions take on disk; what forks share counts once."""
    seen: dict[tuple[int, int], int] = {}
    for name in store.names():
        with suppress(OSError):
            for path in store.folder(name).iterdir():
                stat = path.stat()
                seen[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(seen.values())


def _shrink(
    store: SessionStore, most: int, done: Collected, now: float | None, spared: set[str] | frozenset[str] = frozenset()
) -> None:
    infos = [info for info in store.infos() if info.problem is None and not info.kept and info.name not in spared]
    for info in sorted(infos, key=lambda info: -_age(info, now)):
        if used(store) <= most:
            return
        _give_up(store, info, done)


def _give_up(store: SessionStore, info: SessionInfo, done: Collected) -> None:
    """Remove a session, unless somebody holds it or has promised since to keep it."""
    before = used(store)
    try:
        with store.lock(info.name, wait=False):
            if store.opened(info.name, store.existing(info.name))[1].kept:
                return
            store.remove_held(info.name)
    except (SessionError, OSError):
        return
    done.sessions.append(info.name)
    done.freed += before - used(store)


def _age(info: SessionInfo, now: float | None) -> float:
    """Return the seconds since a session was used; never less than none."""
    clock = time.time() if now is None else now
    return 0.0 if info.used is None else max(0.0, clock - info.used.timestamp())


def _leftovers(store: SessionStore, done: Collected) -> None:
    """Remove folders that a crash left half made or half removed, and locks of sessions that are gone."""
    for path in list(store.root.iterdir()):
        name, _, rest = path.name[1:].rpartition(".")
        if not path.name.startswith("."):
            continue
        if rest == "part":
            owner = name.rpartition(".")[0]
            with suppress(BlockingIOError, SessionError, ValueError, OSError), store.lock(owner, wait=False):
                _remove(path, done)
        elif rest == "lock" and not (store.root / name).exists():
            with suppress(BlockingIOError, SessionError, ValueError, OSError), store.lock(name, wait=False):
                pass  # letting go of it removes it


def _tidy(store: SessionStore, name: str, done: Collected) -> None:
    """Remove from a session's folder what its last commit does not need, a tail that was cut off among it."""
    folder = store.folder(name)
    try:
        if last_segment(folder) is None:
            if not legacy.is_old(folder) and not any(folder.iterdir()):
                folder.rmdir()  # a first save that was killed
                done.files.append(str(folder))
            elif not legacy.is_old(folder):
                for path in [path for path in folder.iterdir() if path.name.startswith(".")]:
                    _remove(path, done)
                with suppress(OSError):
                    folder.rmdir()
                    done.files.append(str(folder))
            return
        journal, manifest, path = store.opened(name, store.folder(name))
        needed = {segment.path for segment in journal.segments}
        for each in list(folder.iterdir()):
            ours = each.name.endswith(f".journal{files.PART}") or each.suffix == ".journal" or legacy.is_part(each)
            if ours and each not in needed:
                _remove(each, done)
        if journal.tail:
            os.truncate(path, journal.end)
            done.freed += journal.tail
            done.files.append(f"{path} behind byte {journal.end}")
        if store.compact(folder, journal, manifest):
            done.compacted.append(name)
    except (SessionError, DamageError, OSError):
        return  # what is damaged stays for whoever can mend it


def _remove(path: Path, done: Collected) -> None:
    with suppress(OSError):
        held = [path] if path.is_file() else list(path.iterdir())
        done.freed += sum(each.stat().st_size for each in held if each.stat().st_nlink == 1)
    files.discard([path])
    done.files.append(str(path))
