"""What is read from a journal: tensors when they are asked for, texts, hash chains; and rows copied into another.

Bytes go from the file into the memory that the tensor keeps, are checked there row by row, and the system is told
ahead what will be read. It knows nothing of names or locks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from longspan.sessions import prefixes
from longspan.sessions.journal import DamageError, Journal, Place
from longspan.sessions.manifest import Manifest
from longspan.sessions.rows import PIECE, Piece, Target, memory_of, text_of

if TYPE_CHECKING:
    from torch import Tensor

_READERS = 2
"""Threads that read one tensor's rows."""


class StoredTensors(Mapping[str, "Tensor"]):
    """A group of tensors, each read and checked when it is asked for, and not kept.

    Reading raises `DamageError` as the journal does, or whatever `fail` makes of it.
    """

    def __init__(self, journal: Journal, group: str, about: Mapping[str, Any], fail: Any) -> None:
        """Take where they lie, what the commit tells of each, and what turns damage into an error for people."""
        self._journal, self._group, self._about, self._fail = journal, group, about, fail

    def __getitem__(self, name: str) -> Tensor:
        about = self._about[name]
        try:
            return read_tensor(self._journal, ("tensor", self._group, name), about)
        except DamageError as error:
            raise self._fail(error) from error

    def __contains__(self, name: object) -> bool:
        return name in self._about  # without reading it, as Mapping does

    def __iter__(self) -> Iterator[str]:
        return iter(self._about)

    def __len__(self) -> int:
        return len(self._about)

    def will_read(self, names: Sequence[str]) -> None:
        """Have the system bring up what these tensors lie in, in the background."""
        for name in names:
            places = self._journal.places(("tensor", self._group, name))
            for run in runs(list(places.values())):
                self._journal.ahead(run[0], sum(place.size for place in run))


def read_tensor(journal: Journal, stream: tuple[str, ...], about: dict[str, Any]) -> Tensor:
    """Return a tensor (DamageError, OSError)."""
    try:
        target = Target.of(about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamageError(journal.last.path, f"tells of {stream[-1]!r} what can't be read ({error})") from error
    if target.flat.numel():
        read_rows(journal, stream, target.numbers, target.sizes, memory_of(target.flat))
    return target.tensor()


def read_rows(
    journal: Journal, stream: tuple[str, ...], numbers: Sequence[int], sizes: Sequence[int] | None, into: memoryview
) -> None:
    """Fill memory with rows of a stream, one after the other (DamageError, OSError).

    Args:
        journal: where they lie.
        stream: whose.
        numbers: of the rows.
        sizes: that they must have; None: any.
        into: as many bytes as all rows.
    """
    places = located(journal, stream, numbers)
    if sizes is not None and [place.size for place in places] != list(sizes):
        raise DamageError(journal.last.path, f"holds rows of {stream[-1]!r} that do not fit together")
    if len(into) <= PIECE:
        done = 0
        for run in runs(places):
            count = sum(place.size for place in run)
            journal.read(run, into[done : done + count])
            done += count
        return
    # Two at a time: one is checked, and its memory made, while the disk gives the other.
    with ThreadPoolExecutor(_READERS) as pool:
        done, waiting = 0, []
        for run in runs(places):
            count = sum(place.size for place in run)
            waiting.append(pool.submit(journal.read, run, into[done : done + count]))
            done += count
        try:
            for each in waiting:
                each.result()
        except BaseException:
            for each in waiting:
                each.cancel()
            raise


def read_bytes(journal: Journal, stream: tuple[str, ...], numbers: Sequence[int]) -> bytes:
    """Return rows of a stream, one after the other (DamageError, OSError)."""
    places = located(journal, stream, numbers)
    data = bytearray(sum(place.size for place in places))
    read_rows(journal, stream, numbers, None, memoryview(data))
    return bytes(data)


def read_texts(journal: Journal, manifest: Manifest) -> dict[str, str]:
    """Return all texts of a commit (DamageError, OSError)."""
    return {name: text_of(read_bytes(journal, ("text", "", name), [0])) for name in manifest.texts}


def read_chain(journal: Journal, manifest: Manifest) -> list[bytes]:
    """Return the hash chain of a commit's tokens (DamageError, OSError)."""
    return prefixes.hashes_of(read_bytes(journal, prefixes.STREAM, prefixes.rows(manifest.prefix)))


def located(journal: Journal, stream: tuple[str, ...], numbers: Sequence[int]) -> list[Place]:
    """Return where rows lie (DamageError: one is not there)."""
    places = journal.places(stream)
    try:
        return [places[number] for number in numbers]
    except KeyError as error:
        raise DamageError(journal.last.path, f"lacks row {error} of {stream[-1]!r}") from error


def runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Yield stretches of rows that lie one after the other in a file, of at most a piece together."""
    run: list[Place] = []
    count = 0
    for place in places:
        follows = run and run[-1].segment == place.segment and run[-1].offset + run[-1].size == place.offset
        if run and (not follows or count + place.size > PIECE):
            yield run
            run, count = [], 0
        run.append(place)
        count += place.size
    if run:
        yield run


class StoredSource:
    """A stream on its way from one journal to another, as it is."""

    def __init__(self, journal: Journal, stream: tuple[str, ...], numbers: Sequence[int]) -> None:
        """Take where the rows lie (DamageError: one is not there)."""
        self.stream, self.numbers, self._journal = stream, numbers, journal
        self._places = located(journal, stream, numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(place.size for place in self._places)

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows, checked (DamageError, OSError)."""
        first = 0
        for run in runs(self._places):
            data = memoryview(bytearray(sum(place.size for place in run)))
            self._journal.read(run, data)
            yield Piece(first, data, [place.size for place in run])
            first += len(run)


def sources_of(journal: Journal, manifest: Manifest, groups: Sequence[str] | None = None) -> list[StoredSource]:
    """Return everything that a commit holds, or the tensors of some groups alone (DamageError: a row is not there)."""
    from longspan.sessions.records import numbers_of

    found = [
        StoredSource(journal, ("tensor", group, name), numbers_of(about["rows"]))
        for group in (manifest.tensors if groups is None else groups)
        for name, about in manifest.tensors[group].items()
    ]
    if groups is None:
        found += [StoredSource(journal, ("text", "", name), [0]) for name in manifest.texts]
        found.append(StoredSource(journal, prefixes.STREAM, prefixes.rows(manifest.prefix)))
    return found
