"""How a commit reaches a session's folder, and the catalogue after it; whoever commits holds the session's lock.

Where most of a journal is not needed any more, the commit goes into a segment of its own and the others go. A session
of the old format becomes a journal here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from longspan.sessions import files, legacy, prefixes, stored
from longspan.sessions.appending import Appender
from longspan.sessions.catalogue import Row
from longspan.sessions.journal import Journal, last_segment, segments
from longspan.sessions.manifest import Manifest
from longspan.sessions.place import SessionPlace
from longspan.sessions.rows import TensorSource, TextSource

COMPACTED = 16 * 2**20
"""Bytes that no commit needs any more, and more than are needed, before a journal is written anew."""


class Committer(SessionPlace):
    """Writes what others decided."""

    _seen: dict[str, str]
    """What of each session this store loaded or saved last (`Manifest.id`)."""

    def commit(
        self,
        folder: Path,
        previous: tuple[Journal | None, Manifest] | None,
        manifest: Manifest,
        sources: Sequence[Any],
        unchanged: Collection[str],
        chain: Sequence[bytes] | None,
    ) -> None:
        """Write one commit, behind the others or, where most of them is not needed any more, in a new segment alone."""
        journal = None if previous is None else previous[0]
        number = 1 if journal is None else journal.number + 1
        held = 0 if journal is None else journal.bytes
        follow = journal
        if journal is not None and sources:
            kept = stored.sources_of(journal, manifest, list(unchanged))
            live = sum(each.nbytes for each in [*sources, *kept])
            if held - live > max(live, COMPACTED):
                follow, sources = None, [*sources, *kept]
                if chain is None:
                    sources.append(stored.StoredSource(journal, prefixes.STREAM, prefixes.rows(manifest.prefix)))
        fresh = not folder.is_dir()
        try:
            files.make_folder(folder)
            appender = Appender(folder, number, follow)
            try:
                for source in sources:
                    appender.write(source)
                file, end = appender.commit(manifest.told())
            except BaseException:
                appender.undo()
                if appender.whole:  # Ctrl-C came too late to take it back: later saves go on from it
                    self._seen[manifest.name] = manifest.id
                raise
        except BaseException:
            if fresh:
                with suppress(OSError):
                    folder.rmdir()  # only an empty one goes: a first save that failed leaves nothing
            raise
        if follow is None:
            self._sweep(folder, file)
            held = 0
        else:
            held = sum(segment.stop for segment in follow.segments[:-1])
        self._seen[manifest.name] = manifest.id
        self.enter(folder, manifest, number, (file, end), held + end, chain)

    def rewrite(self, folder: Path, journal: Journal, manifest: Manifest) -> None:
        """Write what a commit holds into a segment of its own, in the place of all others."""
        newest = last_segment(folder)
        number = journal.number + 1
        appender = Appender(folder, number)
        try:
            for source in stored.sources_of(journal, manifest):
                appender.write(source)
            file, end = appender.commit(manifest.told())
        except BaseException:
            appender.undo()
            raise
        assert newest is None or file > newest.name, "a new segment is the last"
        self._sweep(folder, file)
        self.enter(folder, manifest, number, (file, end), end, stored.read_chain(journal, manifest))

    def compact(self, folder: Path, journal: Journal, manifest: Manifest) -> bool:
        """Write a journal anew of which most is not needed any more; returns whether that was so."""
        live = sum(each.nbytes for each in stored.sources_of(journal, manifest))
        if journal.bytes - live <= max(live, COMPACTED):
            return False
        self.rewrite(folder, journal, manifest)
        return True

    def migrate(self, name: str) -> None:
        """Write the journal of a session of the old format; nothing where there is one."""
        folder = self.folder(name)
        if last_segment(folder) is None and legacy.is_old(folder):
            old = legacy.read(folder, name)
            sources: list[Any] = []
            about: dict[str, Any] = {}
            for group, blob in old.groups.items():
                held = [TensorSource(group, key, each) for key, each in legacy.tensors(folder, name, blob).items()]
                about[group] = {each.stream[2]: each.about() for each in held}
                sources += held
            texts = legacy.texts(folder, name, old.texts)
            sources += [TextSource(key, text) for key, text in texts.items()]
            self.commit(folder, None, replace(old.manifest, tensors=about, texts=list(texts)), sources, (), [])

    def enter(
        self,
        folder: Path,
        manifest: Manifest,
        number: int,
        mark: tuple[str, int],
        held: int,
        chain: Sequence[bytes] | None,
    ) -> Row | None:
        """Tell the catalogue of a commit."""
        try:
            row = Row(
                name=manifest.name,
                file=mark[0],
                end=mark[1],
                folder=folder.stat().st_mtime_ns,
                number=number,
                created=manifest.created.isoformat(),
                saved=manifest.saved.isoformat(),
                used=manifest.saved.timestamp(),
                bytes=held,
                kept=manifest.kept,
                ttl=manifest.ttl,
                identity=dict(manifest.identity),
                state=dict(manifest.state),
            )
        except OSError:
            return None
        self.catalogue.put(row, chain)
        return row

    def _sweep(self, folder: Path, last: str) -> None:
        """Remove the files of a session that a segment which stands alone has replaced."""
        gone = [path for path in segments(folder) if path.name != last]
        with suppress(OSError):
            gone += [path for path in folder.iterdir() if legacy.is_part(path) or _is_part(path)]
        files.discard(gone)


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(f".journal{files.PART}")
