"""What is saved, as rows that are compared, written and read one by one: pages of a tensor, stretches of tokens, texts.

A row is what a tensor holds at one place (or a few neighbouring places) of one axis, that axis first, so that rows lie
in memory as they lie in the file. A row has a number that stays its own as others are added or dropped: of pages it is
the page's.
This module knows nothing of files; torch is imported where a tensor is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from longspan.errors import UsageError
from longspan.sessions.records import numbers_of, ranges

if TYPE_CHECKING:  # torch takes a second to import, and listing sessions needs none of it
    from torch import Tensor

PIECE = 8 * 2**20
"""Bytes that are compared and written together, or one row where that is more."""
READ = 2**20
"""Bytes that are read together: what a core's own cache holds until they are checked and copied."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor to be saved in rows, of which only those that changed are written."""

    tensor: Tensor
    axis: int = 0
    step: int = 1
    """Places of the axis that are one row; the last may be shorter."""
    numbers: Sequence[int] | None = None
    """Of the rows, ascending; None: 0, 1, 2 and so on."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows: the place of the first in the list of numbers, their bytes and sizes."""

    first: int
    data: memoryview
    sizes: list[int]


class TensorSource:
    """A tensor on its way to a file; it must not change until it is written."""

    def __init__(self, group: str, name: str, value: Tensor | Rows) -> None:
        """Take a tensor. Raises UsageError for one that has no bytes of its own."""
        import torch

        rows = value if isinstance(value, Rows) else None
        tensor = (rows.tensor if rows is not None else value).detach()  # type: ignore[union-attr]
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UsageError(
                f"tensor {name!r} of group {group!r} can't be saved: give a plain one instead of "
                f"({tensor.dtype}, {tensor.layout}, on {tensor.device})"
            )
        self.stream: tuple[str, ...] = ("tensor", group, name)
        self.tensor, self.axis, self.step = (
            tensor,
            None if rows is None else rows.axis,
            1 if rows is None else rows.step,
        )
        count = 1 if rows is None else -(-tensor.shape[rows.axis] // rows.step)
        numbers = None if rows is None else rows.numbers
        self.numbers: Sequence[int] = range(count) if numbers is None else numbers
        assert len(self.numbers) == count, f"{len(self.numbers)} numbers for {count} rows"

    def about(self) -> dict[str, Any]:
        """Return what a commit says of the tensor."""
        return {
            "dtype": str(self.tensor.dtype).removeprefix("torch."),
            "shape": list(self.tensor.shape),
            "axis": self.axis,
            "step": self.step,
            "rows": ranges(self.numbers),
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.tensor.numel() * self.tensor.element_size()

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows."""
        if self.axis is None:
            yield Piece(0, _bytes_of(self.tensor), [self.nbytes])
            return
        moved = self.tensor.movedim(self.axis, 0)
        length, each = moved.shape[0], self.nbytes // max(1, moved.shape[0])
        together = max(1, PIECE // max(1, each * self.step))
        for first in range(0, len(self.numbers), together):
            start, stop = first * self.step, min((first + together) * self.step, length)
            sizes = [min(self.step, stop - at) * each for at in range(start, stop, self.step)]
            yield Piece(first, _bytes_of(moved[start:stop]), sizes)


class TextSource:
    """A text on its way to a file, as a stream of one row."""

    def __init__(self, name: str, text: str) -> None:
        """Take a text."""
        self.stream: tuple[str, ...] = ("text", "", name)
        # Text out of broken documents may hold lone surrogates: they come back as they went in.
        self._data = text.encode("utf-8", "surrogatepass")
        self.numbers: Sequence[int] = (0,)

    @property
    def nbytes(self) -> int:
        """Bytes of the text."""
        return len(self._data)

    def pieces(self) -> Iterator[Piece]:
        """Yield the text."""
        yield Piece(0, memoryview(self._data), [len(self._data)])


class Source(Protocol):
    """A stream on its way to a file."""

    @property
    def stream(self) -> tuple[str, ...]:
        """Its kind, group and name."""
        ...

    @property
    def numbers(self) -> Sequence[int]:
        """Of the rows, ascending."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Yield all rows."""
        ...


@dataclass(frozen=True)
class Layout:
    """How the rows of a stored tensor become the tensor again."""

    numbers: list[int]
    sizes: list[int]
    """Bytes of each row."""
    dtype: Any
    shape: tuple[int, ...]
    """Of the tensor."""
    axis: int | None
    """Of the rows; None: the tensor is one row."""

    @classmethod
    def of(cls, about: dict[str, Any]) -> Layout:
        """Return what a commit tells (ValueError, KeyError, TypeError: it tells of no tensor)."""
        import torch

        dtype = getattr(torch, str(about["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown type {about['dtype']}: update torch")
        shape, axis, step = tuple(int(n) for n in about["shape"]), about["axis"], int(about["step"])
        numbers, total = numbers_of(about["rows"]), math.prod(shape) * dtype.itemsize
        if axis is None:
            sizes = [total]
        else:
            length = shape[axis]
            each = total // max(1, length)
            sizes = [min(step, length - at) * each for at in range(0, length, step)]
        if len(sizes) != len(numbers):
            raise ValueError("rows")
        return cls(numbers, sizes, dtype, shape, axis)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def tensor(self, flat: Tensor, count: int | None = None) -> Tensor:
        """Return the tensor, or `count` places of its axis, over the memory of its rows, uint8, one after the other."""
        made = flat.view(self.dtype)
        if self.axis is None:
            return made.view(self.shape)
        places = self.shape[self.axis] if count is None else count
        return made.view(places, *self.shape[: self.axis], *self.shape[self.axis + 1 :]).movedim(0, self.axis)


def memory_of(flat: Tensor) -> memoryview:
    """Return the memory of a tensor of bytes on the CPU."""
    return memoryview(cast("Any", flat.numpy())).cast("B")


def text_of(data: bytes) -> str:
    """Return a text that was saved."""
    return data.decode("utf-8", "surrogatepass")


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes; conjugates and negatives that torch only noted are carried out."""
    import torch

    held = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return memory_of(held.reshape(-1).view(torch.uint8)) if held.numel() else memoryview(b"")
