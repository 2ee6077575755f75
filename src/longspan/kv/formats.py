"""How the numbers of a page are written down: float types as they are, and fp8 with a scale a page and KV head.

A format turns pages `[Hkv, n, PAGE, D]` into codes `[Hkv, n, PAGE, C]` and scales `[Hkv, n, R, S]`, and rows of codes
with their rows of scales back into numbers. R is 1 (a scale for the whole page, or one a channel) or PAGE (one a
token), and keys and values may differ in it, so integer formats fit in without a change elsewhere: `register` one.
It does not know pools or pages: `planes.py` keeps what is encoded here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from longspan.errors import UnknownNameError, UsageError
from longspan.kv.base import PAGE


class Format(ABC):
    """One way to write the numbers of a page. Subclasses say what codes and scales look like and how they are made."""

    name: str
    code_dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float32
    again: str | None = None
    """The format to take for rows that are read and written again in other pages, where this one rounds anew each time;
    None: this one."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one number, scales left out."""

    @abstractmethod
    def code_dim(self, dim: int) -> int:
        """Return how many codes one row of D numbers takes (C)."""

    @abstractmethod
    def scale_shape(self, what: str, dim: int) -> tuple[int, int]:
        """Return (R, S) of the scales of a page of `k` or `v`; (1, 0): none."""

    @abstractmethod
    def encode(self, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return codes `[Hkv, n, PAGE, C]` and scales `[Hkv, n, R, S]` of pages of `k` or `v` `[Hkv, n, PAGE, D]`."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers `[..., D]` of codes `[..., C]`, given the scales `[..., S]` of each row."""

    def page_bytes(self, what: str, heads: int, dim: int) -> int:
        """Return the bytes of one page of `k` or `v`, scales included."""
        rows, columns = self.scale_shape(what, dim)
        codes = PAGE * self.code_dim(dim) * self.code_dtype.itemsize
        return heads * (codes + rows * columns * self.scale_dtype.itemsize)


class FloatFormat(Format):
    """Numbers in a float type, without scales; what lies beyond its range becomes its largest number."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        """Name a float type."""
        self.name, self.code_dtype = name, dtype

    @property
    def bits(self) -> int:
        """See `Format`."""
        return 8 * self.code_dtype.itemsize

    def code_dim(self, dim: int) -> int:
        """See `Format`."""
        return dim

    def scale_shape(self, what: str, dim: int) -> tuple[int, int]:
        """See `Format`."""
        return (1, 0)

    def encode(self, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        if x.dtype != self.code_dtype:
            greatest = torch.finfo(self.code_dtype).max
            x = x.clamp(-greatest, greatest).to(self.code_dtype)
        return x, x.new_empty(*x.shape[:2], 1, 0, dtype=self.scale_dtype)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        return codes.to(dtype)


class Float8(Format):
    """float8 e4m3 (arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, largest 448, no infinity) times a scale.

    The scale of a page and KV head is its largest finite magnitude over 448. A number x comes back within
    `max(|x| / 17, 2^-10 scale)`: x in `2^e (1 .. 2)` comes within `2^(e-4)`, half of the last of 3 mantissa bits, and
    the worst is the tie at `2^e (1 + 1/16)`; below `2^-6 scale`, half the step of the subnormals. NaN stays NaN and
    spoils no other number; infinity becomes the page's largest number.
    """

    name = "fp8"
    again: str | None = "fp8-pow2"
    code_dtype = torch.uint8  # float8 in disguise: PyTorch can't index float8 on every device
    _GREATEST = 448.0

    @property
    def bits(self) -> int:
        """See `Format`."""
        return 8

    def code_dim(self, dim: int) -> int:
        """See `Format`."""
        return dim

    def scale_shape(self, what: str, dim: int) -> tuple[int, int]:
        """See `Format`."""
        return (1, 1)

    def encode(self, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        x = x if x.dtype == torch.float64 else x.float()
        finite = torch.where(x.isfinite(), x.abs(), torch.zeros_like(x))
        limits = torch.finfo(torch.float32)
        scales = self._scales((finite.amax((-1, -2), keepdim=True) / self._GREATEST).clamp(limits.tiny, limits.max))
        scaled = (x / scales).clamp(-self._GREATEST, self._GREATEST).float()
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales

    def _scales(self, least: Tensor) -> Tensor:
        """Return float32 scales, given those by which the largest number just fits."""
        return least.float()

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if codes.device.type == "cpu":
            # Looking numbers up takes a fifth of the time of PyTorch's conversion.
            numbers = _E4M3.to(wide).index_select(0, codes.flatten().int()).view(codes.shape)
        else:
            numbers = codes.view(torch.float8_e4m3fn).to(wide)
        return (numbers * scales.to(wide)).to(dtype)


class Float8Again(Float8):
    """float8 whose scales are powers of two, so that what came back keeps its value in any other page.

    At most one binade of the range is lost, at its small end, and no precision: a number comes back within
    `max(|x| / 17, 2^-10 scale)` too, of a scale up to twice as large. What came back and is written again with another
    scale keeps its value, unless it lies below `2^-6` of that scale.
    """

    name = "fp8-pow2"
    again = None

    def _scales(self, least: Tensor) -> Tensor:
        """Return the next powers of two."""
        mantissa, exponent = torch.frexp(least.float())
        return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int()).clamp(max=2.0**127)


_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
_FORMATS: dict[str, Format] = {}
AUTO = "auto"
"""Not a format but the wish for the float type's own."""


def register(made: Format) -> None:
    """Register a format under its name, which can be taken once (UsageError)."""
    if made.name in _FORMATS:
        raise UsageError(f"a format named {made.name!r} is registered already")
    _FORMATS[made.name] = made


register(FloatFormat("fp64", torch.float64))
register(FloatFormat("fp32", torch.float32))
register(FloatFormat("fp16", torch.float16))
register(FloatFormat("bf16", torch.bfloat16))
register(Float8())
register(Float8Again())


def names() -> list[str]:
    """Return the names of all formats, in the order of registration."""
    return list(_FORMATS)


def named(name: str) -> Format:
    """Return the format of a name (UnknownNameError lists the names)."""
    if name not in _FORMATS:
        raise UnknownNameError(f"unknown KV format {name!r}: use one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def written_again(name: str | None) -> str | None:
    """Return the name of the format for rows that move between pages, given the one that was asked for."""
    return name if name in (None, AUTO) else named(name).again or name


def format_for(dtype: torch.dtype) -> Format:
    """Return the format that holds a float type as it is (UsageError if none does)."""
    for made in _FORMATS.values():
        if made.code_dtype == dtype and dtype.is_floating_point:
            return made
    raise UsageError(f"keys and values of type {dtype} can't be kept: use float32, float16 or bfloat16")


def format_of(name: str | None, dtype: torch.dtype) -> Format:
    """Return the format of a name (`auto`, None: the float type's own), for keys and values computed in `dtype`.

    Raises:
        UnknownNameError: no such format.
        UsageError: it is not narrower than the float type, so that it could only lose and never gain.
    """
    own = format_for(dtype)
    if name is None or name == AUTO:
        return own
    suiting = [made.name for made in _FORMATS.values() if made is own or made.bits < own.bits]
    told = ", ".join([AUTO, *suiting])
    if name not in _FORMATS:
        raise UnknownNameError(f"unknown KV format {name!r}: use one of {told}")
    if name not in suiting:
        raise UsageError(f"KV format {name!r} does not suit keys and values of type {own.name}: use one of {told}")
    return _FORMATS[name]
