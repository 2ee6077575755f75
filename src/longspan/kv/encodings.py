"""What a format is, and those that are floating: float types as they are, and fp8 with a scale a page and KV head.

A format turns pages `[Hkv, n, PAGE, D]` into codes `[Hkv, n, PAGE, C]` and scales `[Hkv, n, R, S]`, and either whole
pages or rows of codes with their rows of scales back into numbers. R divides PAGE: 1 for scales of the whole page, PAGE
for scales a token. Keys and values may differ in R and S.
It does not know pools or pages (`planes.py` keeps what is encoded here), nor other formats (`formats.py` lists them).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from longspan import specs
from longspan.errors import UsageError
from longspan.kv.base import PAGE


@dataclass(frozen=True)
class Format(ABC):
    """One way to write the numbers of a page. Subclasses say what codes and scales look like and how they are made.

    Its dataclass fields are its options. Those of this class say which pages of a context are written in it at all.
    """

    residual: int = 0
    """Newest tokens that stay in the model's own type, with the rest of their pages."""
    sinks: int = 0
    """First tokens of a context that stay in the model's own type, with the rest of their pages."""

    name: ClassVar[str]
    bits: ClassVar[int]
    """Bits of one number (of a value, where keys differ), scales left out."""
    code_dtype: ClassVar[torch.dtype]
    scale_dtype: ClassVar[torch.dtype] = torch.float32
    error: ClassVar[float] = 0.0
    """Typical root mean square error of what comes back, relative to how far the numbers of a page spread."""
    again: ClassVar[str | None] = None
    """The format to take for rows that are read and written again in other pages, where this one rounds anew each time;
    None: this one."""

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        for option in ("residual", "sinks"):
            if getattr(self, option) < 0:
                raise UsageError(f"{option}={getattr(self, option)} of KV format {self.name!r} must be 0 or more")

    @abstractmethod
    def code_dim(self, what: str, dim: int) -> int:
        """Return how many codes one row of D numbers of `k` or `v` takes (C)."""

    @abstractmethod
    def scale_shape(self, what: str, dim: int) -> tuple[int, int]:
        """Return (R, S) of the scales of a page of `k` or `v`; (1, 0): none."""

    @abstractmethod
    def encode(self, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """Return codes `[Hkv, n, PAGE, C]` and scales `[Hkv, n, R, S]` of pages of `k` or `v` `[Hkv, n, PAGE, D]`."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, what: str, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the numbers of codes.

        Args:
            codes: of whole pages `[..., PAGE, C]`, or of any rows `[..., C]`.
            scales: of whole pages `[..., R, S]`, or of each row `[..., S]`.
            what: `k` or `v`.
            dim: numbers a row (D).
            dtype: the float type wanted.
        """

    def page_bytes(self, what: str, heads: int, dim: int) -> int:
        """Return the bytes of one page of `k` or `v`, scales included."""
        rows, columns = self.scale_shape(what, dim)
        codes = PAGE * self.code_dim(what, dim) * self.code_dtype.itemsize
        return heads * (codes + rows * columns * self.scale_dtype.itemsize)

    def number_bytes(self, dim: int, value_dim: int) -> float:
        """Return the bytes of one number of a page, its part of the scales included (`attention.Shape.kv_bytes`)."""
        page = self.page_bytes("k", 1, dim) + self.page_bytes("v", 1, value_dim)
        return page / (PAGE * (dim + value_dim))

    @cached_property
    def coding(self) -> str:
        """The specification with every option that says what codes mean: what a file of codes must name."""
        deciding = [field for field in dataclasses.fields(self) if field.name not in _WHEN]
        return specs.written(self.name, {field.name: getattr(self, field.name) for field in deciding})

    def describe(self) -> str:
        """Return the specification that makes this format again, without options at their defaults."""
        changed = {name: getattr(self, name) for name, usual in self.options().items() if getattr(self, name) != usual}
        return specs.written(self.name, changed)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the options and their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}


_WHEN = ("residual", "sinks")
"""Options that say which pages are written in a format, and not how."""


class FloatFormat(Format):
    """Numbers in a float type, without scales; what lies beyond its range becomes its largest number."""

    def code_dim(self, what: str, dim: int) -> int:
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

    def decode(self, codes: Tensor, scales: Tensor, what: str, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        return codes.to(dtype)


class Float64(FloatFormat):
    """float64, for tests and references."""

    name = "fp64"
    bits = 64
    code_dtype = torch.float64


class Float32(FloatFormat):
    """float32."""

    name = "fp32"
    bits = 32
    code_dtype = torch.float32


class Float16(FloatFormat):
    """float16: 11 bits of precision, up to 65504."""

    name = "fp16"
    bits = 16
    code_dtype = torch.float16
    error = 2.0**-12


class BFloat16(FloatFormat):
    """bfloat16: 8 bits of precision, the range of float32."""

    name = "bf16"
    bits = 16
    code_dtype = torch.bfloat16
    error = 2.0**-9


class Float8(Format):
    """float8 e4m3 (arXiv 2209.05433: 4 bits of exponent, 3 of mantissa, largest 448, no infinity) times a scale.

    The scale of a page and KV head is its largest finite magnitude over 448. A number x comes back within
    `max(|x| / 17, 2^-10 scale)`: x in `2^e (1 .. 2)` comes within `2^(e-4)`, half of the last of 3 mantissa bits, and
    the worst is the tie at `2^e (1 + 1/16)`; below `2^-6 scale`, half the step of the subnormals. NaN stays NaN and
    spoils no other number; infinity becomes the page's largest number.
    """

    name = "fp8"
    bits = 8
    again: ClassVar[str | None] = "fp8-pow2"
    code_dtype = torch.uint8  # float8 in disguise: PyTorch can't index float8 on every device
    error = 0.026
    _GREATEST = 448.0

    def code_dim(self, what: str, dim: int) -> int:
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

    def decode(self, codes: Tensor, scales: Tensor, what: str, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if codes.device.type == "cpu":
            # Looking numbers up takes a fifth of the time of PyTorch's conversion.
            numbers = _E4M3.to(wide).index_select(0, codes.flatten().int()).view(codes.shape)
        else:
            numbers = codes.view(torch.float8_e4m3fn).to(wide)  # a copy
        return numbers.mul_(scales.to(wide)).to(dtype)


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
