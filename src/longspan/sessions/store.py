"""Named sessions on disk: each save is one commit, which is there as a whole or not at all.

A session is a folder that holds its journal (`journal.py`): a save appends the rows that changed, then one commit
record, so that a crash or a full disk at any byte leaves the commit before it. A catalogue (`catalogue.py`) beside the
folders answers listings and finds prefixes; it can be lost. This module knows nothing of models: it keeps JSON, tensors
and texts, and what they mean is its caller's. It imports torch only when tensors are saved or loaded.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan import settings
from longspan.errors import SaveError, SessionCorruptError, SessionError, SessionNotFoundError, UsageError
from longspan.sessions import files, legacy, prefixes, stored
from longspan.sessions.catalogue import Row
from longspan.sessions.changing import Changes
from longspan.sessions.infos import Prefix, SavedSession, SessionInfo, info_of
from longspan.sessions.journal import DamageError, Journal, last_segment
from longspan.sessions.manifest import (
    JSON,
    Manifest,
    NewerFormatError,
    VanishedError,
    as_json,
    compare,
    damage,
    manifest_of,
)
from longspan.sessions.messages import failure
from longspan.sessions.place import size_of
from longspan.sessions.rows import Rows, TensorSource, TextSource

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["JSON", "Prefix", "Rows", "SavedSession", "SessionInfo", "SessionStore"]


class SessionStore(Changes):
    """Sessions under one folder, for any number of processes; the first save makes the folder."""

    def __init__(self, root: Path | None = None, quota: int | None = None) -> None:
        """Take a folder.

        Args:
            root: of all sessions; None: the user's.
            quota: bytes that they may take on disk; None: what `LONGSPAN_SESSIONS_QUOTA` says, or no limit.
        """
        super().__init__(root)
        self.quota = settings.sessions_quota() if quota is None else quota
        self._seen = {}

    # --- saving -----------------------------------------------------------------------------------------------

    def save(
        self,
        name: str,
        identity: Mapping[str, JSON],
        state: Mapping[str, JSON],
        tensors: Mapping[str, Mapping[str, Tensor | Rows]],
        texts: Mapping[str, str],
        unchanged: Collection[str] = (),
        *,
        tokens: Sequence[int] | None = None,
        prefix_identity: Mapping[str, JSON] | None = None,
        versions: Mapping[str, str] | None = None,
        kept: bool | None = None,
        ttl: float | None = None,
    ) -> Path:
        """Commit a session and return its folder; what was saved under that name before is replaced.

        Rows that are there already are not written again. The groups of tensors in `unchanged` are kept as this store
        last loaded or saved them (else as they are on disk) and not looked at; the others must not be changed by
        another thread meanwhile.

        Args:
            name: of the session.
            identity: what must match when it is loaded.
            state: JSON.
            tensors: by group and name, whole or in rows.
            texts: by name.
            unchanged: groups.
            tokens: that the session's memory has read, by which requests find it; None: as they were saved before
                where anything is unchanged, else none.
            prefix_identity: what such a request must agree with; None: `identity`.
            versions: of what wrote it, for people.
            kept: whether it stays until it is removed; else it goes when there is no room, or its time is over. None:
                as it was promised before, and what is new stays.
            ttl: seconds after its last use; None: no limit of time, or as before.

        Raises UsageError for a name, a JSON value, a tensor or an unchanged group that can't be saved,
        SessionCorruptError if an unchanged group is damaged or the session is of a later version, and
        SaveError if the disk or the quota is full or another process has replaced an unchanged group: what was saved
        before is untouched then.
        """
        folder = self.folder(name)
        if both := sorted(set(tensors) & set(unchanged)):
            raise UsageError(f"group {both[0]!r} is given as unchanged and with tensors: choose one")
        identity, state = as_json("identity", identity), as_json("state", state)
        sources = {
            group: [TensorSource(group, key, held) for key, held in held_in.items()]
            for group, held_in in tensors.items()
        }
        words = [TextSource(key, text) for key, text in texts.items()]
        chain = (
            None if tokens is None else prefixes.chain(identity if prefix_identity is None else prefix_identity, tokens)
        )
        needed = sum(each.nbytes for group in sources.values() for each in group) + sum(word.nbytes for word in words)
        with self.saving(name, needed):
            files.make_folder(self.root)
            with self.lock(name):
                previous = self._previous(name, strict=bool(unchanged))
                before = None if previous is None else previous[1]
                about: dict[str, Any] = {group: self._kept(name, group, previous) for group in unchanged}
                about |= {group: {each.stream[2]: each.about() for each in held} for group, held in sources.items()}
                if chain is None and before is not None and unchanged:
                    pages = before.prefix
                else:
                    pages, chain = len(chain or ()), chain or []
                now = datetime.now(UTC)
                if kept is None:
                    kept, ttl = (True, None) if before is None else (before.kept, before.ttl)
                manifest = Manifest(
                    name,
                    now if before is None else before.created,
                    now,
                    identity,
                    state,
                    about,
                    list(texts),
                    pages,
                    versions or {},
                    kept,
                    ttl,
                    None if before is None else before.parent,
                    secrets.token_hex(8),
                )
                self._make_room(name, needed, previous)
                everything: list[Any] = [each for held in sources.values() for each in held] + words
                everything += [] if chain is None else [prefixes.ChainSource(chain)]
                self.commit(folder, previous, manifest, everything, unchanged, chain)
        return folder

    def check_writable(self, name: str) -> None:
        """Raise SaveError if a session of that name could not be saved: to be told before reading for hours.

        Nothing is written but a file that is gone again, and the folder of all sessions if there is none.
        """
        folder = self.folder(name)
        try:
            files.make_folder(self.root)
            with tempfile.TemporaryFile(dir=folder if folder.is_dir() else self.root):
                pass
        except OSError as error:
            raise SaveError(failure(folder, name, error)) from error

    # --- reading ----------------------------------------------------------------------------------------------

    def load(self, name: str, identity: Mapping[str, JSON] | None = None, *, lazily: bool = False) -> SavedSession:
        """Return a saved session, every byte of it checked; its tensors are on the CPU.

        Args:
            name: of the session.
            identity: what must match.
            lazily: whether tensors are read, and checked, each time one is asked for.

        Raises SessionNotFoundError if there is none of that name, SessionMismatchError if a key of `identity`
        was saved with another value, SessionCorruptError for damage or a later version, UsageError for a bad
        name, SessionError if the files can't be read.
        """
        asked = as_json("identity", identity or {})

        def read(folder: Path) -> SavedSession:
            if last_segment(folder) is None and legacy.is_old(folder):
                old = legacy.read(folder, name)
                compare(name, old.manifest.identity, asked)
                groups = {group: legacy.tensors(folder, name, blob) for group, blob in old.groups.items()}
                texts = legacy.texts(folder, name, old.texts)
                return self._saved(old.manifest, groups, texts, old.bytes, 0)
            journal, manifest, _ = self.opened(name, folder)
            compare(name, manifest.identity, asked)

            def fail(error: DamageError) -> SessionCorruptError:
                return self.told(name, error)

            held: dict[str, Mapping[str, Tensor]] = {}
            for group, about in manifest.tensors.items():
                lazy = stored.StoredTensors(journal, group, about, fail)
                held[group] = lazy if lazily else dict(lazy)
            texts = stored.read_texts(journal, manifest)
            self._seen[name] = manifest.id
            return self._saved(manifest, held, texts, journal.bytes, journal.number)

        saved = self.steadily(name, read)
        self.catalogue.touch(name, time.time())
        return saved

    def longest_prefix(self, tokens: Sequence[int], identity: Mapping[str, JSON], *, leave: int = 1) -> list[Prefix]:
        """Return the sessions that begin as these tokens do, those with most in common first; a listing, no promise.

        Args:
            tokens: of a request.
            identity: as the sessions were saved with (`prefix_identity`).
            leave: tokens of the request that must be left to read.
        """
        chain = prefixes.chain(as_json("identity", identity), tokens[: max(0, len(tokens) - leave)])
        return [Prefix(name, pages * prefixes.PAGE) for name, pages in self.catalogue.longest(chain)]

    def hit(self, name: str, tokens: int) -> None:
        """Count that a request found so many tokens in a session that it had not asked for."""
        self.catalogue.touch(name, time.time(), tokens)

    def show(self, name: str) -> SessionInfo:
        """Return what is known of a session; of its rows nothing is looked at. Raises as `load`."""
        return self.steadily(name, lambda folder: self._info(name, folder, None))

    def commits(self, name: str) -> list[tuple[int, datetime]]:
        """Return number and time of every commit that can be gone back to, oldest first. Raises as `load`."""

        def read(folder: Path) -> list[tuple[int, datetime]]:
            if last_segment(folder) is None and legacy.is_old(folder):
                return []
            journal, _, path = self.opened(name, folder)
            found = {}
            for number in sorted({record.commit for _, record in journal.commits}):
                found[number] = manifest_of(journal.commit(number).told, name, path).saved
            return list(found.items())

        return self.steadily(name, read)

    def infos(self) -> list[SessionInfo]:
        """Return what is known of all sessions, damage being told in `problem`, without waiting for a save.

        Raises SessionError if the folder itself can't be listed.
        """
        infos, rows, root = [], self.catalogue.rows(), str(self.root)
        for name in self.names():
            try:
                row = rows.get(name)
                if row is not None and _still(row, f"{root}/{name}"):
                    infos.append(info_of(row))
                    continue
                infos.append(self.steadily(name, lambda folder, n=name, r=row: self._info(n, folder, r), wait=False))  # type: ignore[misc]
            except SessionNotFoundError:  # removed since it was listed
                continue
            except BlockingIOError:
                problem = f"session {name!r} is being saved or removed by another process: look again later"
                infos.append(SessionInfo(name, None, None, size_of(self.folder(name)), {}, {}, problem))
            except SessionError as error:
                infos.append(SessionInfo(name, None, None, size_of(self.folder(name)), {}, {}, str(error)))
        return infos

    # --- steps ------------------------------------------------------------------------------------------------

    def _make_room(self, name: str, needed: int, previous: tuple[Journal | None, Manifest] | None) -> None:
        if self.quota is not None:
            from longspan.sessions import upkeep

            held = 0 if previous is None or previous[0] is None else previous[0].bytes
            upkeep.make_room(self, name, max(0, needed - held), self.quota)

    def _saved(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        held: int,
        number: int,
    ) -> SavedSession:
        return SavedSession(
            manifest.name,
            manifest.created,
            manifest.saved,
            manifest.identity,
            manifest.state,
            tensors,
            texts,
            held,
            number,
        )

    def _info(self, name: str, folder: Path, row: Row | None) -> SessionInfo:
        """Return what is known of a session: what the catalogue knows, where the files bear the marks it knows."""
        row = row or self.catalogue.row(name)
        if row is not None and _still(row, str(folder)):
            return info_of(row)
        if last_segment(folder) is None and legacy.is_old(folder):
            old = legacy.read(folder, name)
            about = old.manifest
            return SessionInfo(name, about.created, about.saved, old.bytes, about.identity, about.state)
        journal, manifest, path = self.opened(name, folder)
        chain = stored.read_chain(journal, manifest)
        mark = path.name, journal.end
        entered = self.enter(folder, manifest, journal.number, mark, journal.bytes, chain)
        journal.close()
        if entered is None:
            raise VanishedError(damage(name, folder, "is missing"))
        known = self.catalogue.row(name)
        return info_of(known if known is not None and known.file == entered.file else entered)

    def _previous(self, name: str, strict: bool) -> tuple[Journal | None, Manifest] | None:
        """Return the commit on disk; None if there is none or, unless `strict`, it is damaged."""
        folder = self.folder(name)
        if not folder.is_dir():
            return None
        try:
            self.migrate(name) if strict else None
            if last_segment(folder) is None and legacy.is_old(folder):
                return None, legacy.read(folder, name).manifest
            journal, manifest, _ = self.opened(name, folder)
        except NewerFormatError:
            raise
        except SessionCorruptError:
            if strict:
                raise
            return None
        return journal, manifest

    def _kept(self, name: str, group: str, previous: tuple[Journal | None, Manifest] | None) -> Any:
        """Return what a commit tells of an unchanged group."""
        about = None if previous is None else previous[1].tensors.get(group)
        if previous is None or previous[0] is None or about is None:
            raise UsageError(f"session {name!r} has no saved group {group!r} that could stay unchanged: save it whole")
        seen = self._seen.get(name)
        if seen is not None and seen != previous[1].id:
            raise SaveError(
                f"can't save session {name!r}: another process has saved it since it was opened here; save it "
                "under another name, or open it again (what the other process saved is untouched)"
            )
        return about


def _still(row: Row, folder: str) -> bool:
    """Whether a session's files bear the marks that the catalogue knows."""
    try:
        # Of a thousand sessions: a Path takes several times as long.
        made, size = os.stat(folder).st_mtime_ns, os.stat(f"{folder}/{row.file}").st_size  # noqa: PTH116
        return (made, size) == (row.folder, row.end)
    except OSError:
        return False
