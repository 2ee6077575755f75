"""What is read from a journal: tensors or their pages as they are asked for, texts, hash chains, rows to copy.

Bytes go from the file into the memory that the tensor keeps, are checked there row by row, and the system is told
ahead what will be read. It knows nothing of names or locks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from longspan.errors import SessionError
from longspan.sessions import prefixes
from longspan.sessions.journal import DamageError, Journal
from longspan.sessions.manifest import Manifest
from longspan.sessions.records import numbers_of
from longspan.sessions.rows import PIECE, READ, Layout, Piece, memory_of, text_of

if TYPE_CHECKING:
    from torch import Tensor

    from longspan.sessions.places import Places

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

    def rows(self, name: str) -> StoredRows | None:
        """Return a tensor of pages that are read one by one; None: it is stored otherwise."""
        about = self._about[name]
        if about["axis"] != 1 or about["step"] != 1:
            return None
        try:
            return StoredRows(self._journal, ("tensor", self._group, name), about, self._fail)
        except DamageError as error:
            raise self._fail(error) from error

    def will_read(self, names: Sequence[str]) -> None:
        """Have the system bring up what these tensors lie in, in the background."""
        for name in names:
            places = self._journal.places(("tensor", self._group, name))
            for run in places.runs(PIECE):
                self._journal.ahead(places.part(run))


class StoredRows:
    """A tensor `[heads, pages, ...]` of which pages are read, and checked, as they are asked for (`kv.coming.Rows`)."""

    here = False
    """It is in a file."""

    def __init__(self, journal: Journal, stream: tuple[str, ...], about: dict[str, Any], fail: Any) -> None:
        """Take where it lies (DamageError: a page is not there), and what turns damage into an error for people."""
        self._journal, self._fail = journal, fail
        self._layout = _layout(journal, stream, about)
        self._places = located(journal, stream, self._layout.numbers, self._layout.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self._layout.shape

    @property
    def dtype(self) -> Any:
        """Of its numbers."""
        return self._layout.dtype

    def read(self, first: int, last: int) -> Tensor:
        """Return the pages at the places `first .. last - 1`, `[heads, n, ...]` (SessionCorruptError, SessionError)."""
        import torch

        places = self._places.part(slice(first, last))
        with torch.inference_mode(False):
            flat = torch.empty(places.nbytes, dtype=torch.uint8)
        with self._telling():
            _read(self._journal, places, memory_of(flat))
        return self._layout.tensor(flat, last - first)

    def read_into(self, first: int, last: int, target: Tensor, start: int) -> None:
        """Read those pages to the places from `start` on of such a tensor, which has no gaps and lies on the CPU."""
        import torch

        heads, count = target.shape[:2]
        each = target[0, 0].nbytes
        memory = memory_of(target.view(-1).view(torch.uint8))
        places = self._places.part(slice(first, last))
        with self._telling():
            for run in places.runs(READ):
                at = [(head * count + start + i) * each for i in range(run.start, run.stop) for head in range(heads)]
                self._journal.scatter(places.part(run), [memory[byte : byte + each] for byte in at])

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except DamageError as error:
            raise self._fail(error) from error
        except OSError as error:
            path = self._journal.last.path
            raise SessionError(f"{path} can't be read ({error.strerror or error}): look after the disk") from error


def read_tensor(journal: Journal, stream: tuple[str, ...], about: dict[str, Any]) -> Tensor:
    """Return a tensor (DamageError, OSError)."""
    layout = _layout(journal, stream, about)
    import torch

    from longspan import large

    flat = large.empty((layout.nbytes,), torch.uint8)
    if flat.numel():
        _read(journal, located(journal, stream, layout.numbers, layout.sizes), memory_of(flat))
    return layout.tensor(flat)


def _layout(journal: Journal, stream: tuple[str, ...], about: dict[str, Any]) -> Layout:
    try:
        return Layout.of(about)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamageError(journal.last.path, f"tells of {stream[-1]!r} what can't be read ({error})") from error


def _read(journal: Journal, places: Places, into: memoryview) -> None:
    """Fill memory with rows, one after the other (DamageError, OSError)."""
    ends = places.sizes.cumsum()
    starts = ends - places.sizes

    def one(run: slice) -> None:
        journal.read(places.part(run), into[int(starts[run.start]) : int(ends[run.stop - 1])])

    runs = list(places.runs(READ))
    if len(runs) == 1 or len(into) <= READ:
        for run in runs:
            one(run)
        return
    # Two at a time: one is checked, and its memory made, while the disk gives the other.
    with ThreadPoolExecutor(_READERS) as pool:
        waiting = [pool.submit(one, run) for run in runs]
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
    data = bytearray(places.nbytes)
    _read(journal, places, memoryview(data))
    return bytes(data)


def read_texts(journal: Journal, manifest: Manifest) -> dict[str, str]:
    """Return all texts of a commit (DamageError, OSError)."""
    return {name: text_of(read_bytes(journal, ("text", "", name), [0])) for name in manifest.texts}


def read_chain(journal: Journal, manifest: Manifest) -> list[bytes]:
    """Return the hash chain of a commit's tokens (DamageError, OSError)."""
    return prefixes.hashes_of(read_bytes(journal, prefixes.STREAM, prefixes.rows(manifest.prefix)))


def located(
    journal: Journal, stream: tuple[str, ...], numbers: Sequence[int], sizes: Sequence[int] | None = None
) -> Places:
    """Return where rows lie, of these sizes where any are given (DamageError: one is not there, or of another)."""
    try:
        places = journal.places(stream).find(numbers)
    except KeyError as error:
        raise DamageError(journal.last.path, f"lacks row {error} of {stream[-1]!r}") from error
    if sizes is not None and places.sizes.tolist() != list(sizes):
        raise DamageError(journal.last.path, f"holds rows of {stream[-1]!r} that do not fit together")
    return places


class StoredSource:
    """A stream on its way from one journal to another, as it is."""

    def __init__(self, journal: Journal, stream: tuple[str, ...], numbers: Sequence[int]) -> None:
        """Take where the rows lie (DamageError: one is not there)."""
        self.stream, self.numbers, self._journal = stream, numbers, journal
        self._places = located(journal, stream, numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._places.nbytes

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows, checked (DamageError, OSError)."""
        for run in self._places.runs(PIECE):
            places = self._places.part(run)
            data = memoryview(bytearray(places.nbytes))
            self._journal.read(places, data)
            yield Piece(run.start, data, places.sizes.tolist())


def sources_of(journal: Journal, manifest: Manifest, groups: Sequence[str] | None = None) -> list[StoredSource]:
    """Return everything that a commit holds, or the tensors of some groups alone (DamageError: a row is not there)."""
    found = [
        StoredSource(journal, ("tensor", group, name), numbers_of(about["rows"]))
        for group in (manifest.tensors if groups is None else groups)
        for name, about in manifest.tensors[group].items()
    ]
    if groups is None:
        found += [StoredSource(journal, ("text", "", name), [0]) for name in manifest.texts]
        found.append(StoredSource(journal, prefixes.STREAM, prefixes.rows(manifest.prefix)))
    return found
