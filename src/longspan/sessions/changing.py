"""What is done to saved sessions without a model: fork, go back, promise to keep, add from elsewhere, remove."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longspan.errors import SaveError, SessionCorruptError, SessionError, UsageError
from longspan.sessions import files, stored
from longspan.sessions.appending import Appender
from longspan.sessions.committing import Committer
from longspan.sessions.journal import DamageError, Journal
from longspan.sessions.manifest import Manifest, manifest_of
from longspan.sessions.messages import failure


class Changes(Committer):
    """Changes to whole sessions."""

    def fork(self, source: str, name: str, *, kept: bool = True, ttl: float | None = None) -> Path:
        """Save under a new name what is saved under another, sharing its files: nothing is copied.

        Either may be removed first. Raises as `load`; UsageError if the new name is taken, SaveError as `save`.
        """
        folder = self.folder(name)
        self._check_free(name)
        self.existing(source)
        with self.saving(name), ExitStack() as stack:
            for each in sorted({source, name}):
                stack.enter_context(self.lock(each))
            self._check_free(name)
            self.migrate(source)
            journal, manifest, _ = self.opened(source, self.existing(source))
            stack.callback(journal.close)
            shared = [(each.path.name, each.stop) for each in journal.segments]
            now = datetime.now(UTC)
            manifest = replace(manifest, name=name, created=now, saved=now, kept=kept, ttl=ttl, parent=source)
            made = self.root / f".{name}.{secrets.token_hex(8)}{files.PART}"
            try:
                made.mkdir(mode=0o700)
                for segment in journal.segments:
                    files.link_or_copy(segment.path, made / segment.path.name, segment.stop)
                appender = Appender.after(made, journal, shared)
                try:
                    mark = appender.commit(manifest.told())
                except BaseException:
                    appender.undo()
                    raise
                made.rename(folder)
                files.sync_folder(self.root)
            except BaseException:
                files.discard([made])
                raise
            chain = self.catalogue.prefixes(source)
            self.enter(folder, manifest, journal.number + 1, mark, journal.bytes + mark[1], chain)
            self._seen[name] = manifest.id
        return folder

    def fork_seen(self, source: str, name: str) -> bool:
        """Fork a session, and return whether what is shared is what this store loaded or saved last (errors: `fork`).

        If it is not, nothing was forked.
        """
        seen = self._seen.get(source)
        if seen is None or self.opened(source, self.existing(source))[1].id != seen:
            return False
        self.fork(source, name)
        return self._seen.get(name) == seen

    def restore(self, name: str, number: int | None = None) -> int:
        """Go back to an earlier commit, and return its number; what came after is forgotten for good.

        Args:
            name: of the session.
            number: of the commit; None: the last that is whole, rows and all.

        Raises UsageError where there is no such commit, else as `load` and `save`.
        """
        folder = self.existing(name)
        with self.saving(name), self.lock(name):
            self.migrate(self.existing(name).name)
            journal, manifest = self._whole(name, folder, number)
            with closing(journal):
                # Under another id: who holds what came after can't take it for this.
                self.rewrite(folder, journal, replace(manifest, id=secrets.token_hex(8)))
                return journal.number

    def keep(self, name: str, kept: bool = True, ttl: float | None = None) -> None:
        """Say whether a session stays until it is removed, or for how many seconds after its last use (as `save`)."""
        folder = self.existing(name)
        with self.saving(name), self.lock(name):
            self.migrate(self.existing(name).name)
            journal, manifest, _ = self.opened(name, folder)
            with closing(journal):
                self.commit(folder, (journal, manifest), replace(manifest, kept=kept, ttl=ttl), [], (), None)

    def put(self, manifest: Manifest, sources: Sequence[Any], chain: Sequence[bytes]) -> None:
        """Save a session that comes from elsewhere, under a name that is free (as `save`)."""
        with self.saving(manifest.name):
            files.make_folder(self.root)
            with self.lock(manifest.name):
                self._check_free(manifest.name)
                self.commit(self.folder(manifest.name), None, manifest, sources, (), chain)

    def remove(self, name: str) -> None:
        """Remove a session, damaged or not; forks of it stay whole.

        Raises SessionNotFoundError if there is none, SessionError if the disk refuses, UsageError for a bad
        name.
        """
        folder = self.folder(name)
        try:
            self.existing(name)  # before the lock, which would make a file
            with self.lock(name):
                self.remove_held(name)
        except SessionError:
            raise
        except OSError as error:
            raise SessionError(f"can't remove session {name!r} in {folder}: {error.strerror or error}") from error

    def remove_held(self, name: str) -> None:
        """Remove a session whose lock is held. Raises as `remove`, and OSError."""
        # Gone by one rename: half a session is never seen.
        gone = self.root / f".{name}.{secrets.token_hex(8)}{files.PART}"
        self.existing(name).rename(gone)
        self._seen.pop(name, None)
        self.catalogue.drop(name)
        shutil.rmtree(gone)

    @contextmanager
    def saving(self, name: str, needed: int | None = None) -> Iterator[None]:
        """Tell in people's words what goes wrong inside: damage, and what the disk refuses (SaveError).

        Args:
            name: of the session.
            needed: its bytes, where that is known.
        """
        try:
            yield
        except SessionError:  # some are an OSError too
            raise
        except DamageError as error:
            raise self.told(name, error) from error
        except OSError as error:
            raise SaveError(failure(self.folder(name), name, error, needed)) from error

    def _check_free(self, name: str) -> None:
        if self.exists(name):
            raise UsageError(f"a session {name!r} is saved already: choose another name, or remove it first")

    def _whole(self, name: str, folder: Path, number: int | None) -> tuple[Journal, Manifest]:
        """Return the journal up to a commit of which every row is whole: that one, or the newest there is."""
        with closing(Journal.open(folder, whole=False)) as journal:
            numbers = sorted({record.commit for _, record in journal.commits}, reverse=True)
        if number is not None and number not in numbers:
            raise UsageError(f"session {name!r} has no commit {number}: choose one of {numbers[-1]} to {numbers[0]}")
        for each in numbers if number is None else [number]:
            journal = Journal.open(folder, whole=False, until=each)
            try:
                manifest = manifest_of(journal.commit().told, name, journal.last.path)
                for source in stored.sources_of(journal, manifest):
                    for _ in source.pieces():
                        pass
                return journal, manifest
            except (DamageError, SessionCorruptError):
                if number is not None or each == numbers[-1]:
                    raise
        raise AssertionError("a journal has a commit")
