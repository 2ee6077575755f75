"""A session as one file that can be carried elsewhere: a segment that stands alone, checked as it is written and read.

It knows nothing of models: whether one can continue it is told when it is opened.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from longspan.errors import SaveError, SessionCorruptError, UsageError
from longspan.sessions import stored
from longspan.sessions.appending import Appender
from longspan.sessions.journal import DamageError, Journal
from longspan.sessions.manifest import NewerFormatError, later, manifest_of
from longspan.sessions.records import LaterError
from longspan.sessions.store import SessionStore

SUFFIX = ".longspan"


def export(store: SessionStore, name: str, path: Path) -> Path:
    """Write a session into one file, and return where.

    Args:
        store: that holds it.
        name: of the session.
        path: a file that is not there yet, or a folder in which it gets the session's name.

    Raises as `SessionStore.load`; UsageError where a file is there already, SaveError if the disk refuses.
    """
    target = path / f"{name}{SUFFIX}" if path.is_dir() else path
    if target.exists():
        raise UsageError(f"{target} is there already: give another name, or remove it first")
    try:
        with store.lock(store.existing(name).name):
            store.migrate(name)
            journal, manifest, _ = store.opened(name, store.folder(name))
            appender = Appender.alone(target, 1)
            try:
                for source in stored.sources_of(journal, manifest):
                    appender.write(source)
                appender.commit(manifest.told())
            except BaseException:
                appender.undo()
                raise
    except DamageError as error:
        raise store.told(name, error) from error
    except (UsageError, SessionCorruptError):
        raise
    except BlockingIOError as error:
        raise UsageError(f"{target} is being written by another process: wait for it, or give another name") from error
    except OSError as error:
        raise SaveError(
            f"can't write {target} ({error.strerror or error}): free some space, or give another path"
        ) from error
    return target


def import_(store: SessionStore, path: Path, name: str | None = None) -> str:
    """Add a session from a file that `export` wrote, every row checked, and return its name.

    Args:
        store: where to.
        path: of the file.
        name: under which; None: the name that it had.

    Raises UsageError where there is no such file or the name is taken, SessionCorruptError for damage or a later
    version, SaveError if the disk refuses.
    """
    if not path.is_file():
        raise UsageError(f"{path} is no file: give one that `longspan session export` wrote")
    told = path.name if name is None else name
    try:
        with closing(Journal.open(path)) as journal:
            commit = journal.commit()
            manifest = manifest_of(commit.told, told, path)
            name = str(commit.told.get("name")) if name is None else name
            if store.exists(name):
                raise UsageError(f"a session {name!r} is saved already: import it under another name with --name NAME")
            now = datetime.now(UTC)
            store.put(
                replace(manifest, name=name, saved=now),
                stored.sources_of(journal, manifest),
                stored.read_chain(journal, manifest),
            )
    except DamageError as error:
        raise SessionCorruptError(f"{path} {error}: it is damaged, or no exported session; export it again") from error
    except LaterError as error:
        raise NewerFormatError(later(told, path, str(error))) from error
    except shutil.Error as error:
        raise SaveError(str(error)) from error
    return name
