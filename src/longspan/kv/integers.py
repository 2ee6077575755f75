"""Integer formats: a few bits a number, with a step and a centre for every group of numbers.

After KIVI (arXiv 2402.02750, section 3.2): keys are grouped by channel, over `group` neighbouring tokens of a page,
since their outliers keep to a few channels; values by token, over `group` neighbouring channels. A group from `lo` to
`hi` with L = 2^bits - 1 keeps a step and a centre c, each a bfloat16, and for every x an integer q from 0 to L:

    c = (lo + hi) / 2        step = 2 max(hi - c, c - lo) / L, rounded up        x ~ c + step (q - L / 2)

KIVI keeps the least number in place of the centre. Rounding a centre to bfloat16 costs less than a quarter as much,
and the step makes up for it: every x comes back within half a step. bfloat16 has the range of float32, so that no
number is too large or too small for its group.

`rotate` mixes the channels of each key by a Hadamard matrix first (QuaRot, arXiv 2404.00456), and back when it is read:
rotary embedding comes between a kept key and the query, so that neither could stay rotated. Values are not rotated: it
gained nothing there (docs/kv_formats.md). Keys may have more bits than values (`keys`): at the same bytes that loses
less than the same bits for both.

Rows that eviction moves to other pages fall into other groups of a channel's numbers, and their keys are rounded anew,
unless keys too are grouped by token (`by=token`): what shares its steps with no other row is moved as it is.

Numbers of 2 and 4 bits share bytes, neighbouring channels from the low bits up. Of 3 bits, the two low ones of all
channels come first, in the same way, then the high ones.

A NaN makes its group NaN, and with `rotate` those of its key: a query that reads it shall say so, and no other group
changes. Infinity becomes the page's largest finite magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from longspan.errors import UsageError
from longspan.kv import hadamard
from longspan.kv.base import PAGE
from longspan.kv.encodings import Format

_LARGEST = torch.finfo(torch.bfloat16).max
_GROUPS = (16, 32, 64)
_BY = ("channel", "token")
_PARTS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""How many bits of each number are packed together, the low ones first."""


@dataclass(frozen=True)
class Integers(Format):
    """Numbers in 8, 4, 3 or 2 bits."""

    residual: int = 128
    sinks: int = 64
    group: int = 32
    """Numbers that share a step and a centre: tokens of a page for keys, channels for values."""
    rotate: bool = True
    """Whether the channels of a key are mixed before it is quantised."""
    keys: int = 0
    """Bits of one number of a key; 0: as many as of a value."""
    by: str = "channel"
    """What shares a step of keys: neighbouring tokens of a `channel`, or neighbouring channels of a `token`, which
    loses more at once but nothing more when rows move to other pages."""

    code_dtype: ClassVar[torch.dtype] = torch.uint8
    scale_dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        if self.group not in _GROUPS:
            allowed = ", ".join(map(str, _GROUPS))
            raise UsageError(f"group={self.group} of KV format {self.name!r} is unknown: use one of {allowed}")

        if self.keys not in (0, *_PARTS):
            allowed = ", ".join(map(str, _PARTS))
            raise UsageError(f"keys={self.keys} of KV format {self.name!r} is unknown: use one of {allowed}")

        if self.by not in _BY:
            raise UsageError(f"by={self.by} of KV format {self.name!r} is unknown: use one of {', '.join(_BY)}")

    def _by_channel(self, what: str) -> bool:
        return what == "k" and self.by == "channel"

    def bits_of(self, what: str) -> int:
        """Return the bits of one number of `k` or `v`."""
        return self.keys if what == "k" and self.keys else self.bits

    def levels(self, what: str) -> int:
        """Return the greatest code of `k` or `v` (L)."""
        return int(2 ** self.bits_of(what) - 1)

    def code_dim(self, what: str, dim: int) -> int:
        """See `Format`: bytes."""
        return sum(-(-dim * bits // 8) for bits in _PARTS[self.bits_of(what)])

    def scale_shape(self, what: str, dim: int) -> tuple[int, int]:
        """See `Format`: steps, then centres."""
        return (PAGE // self.group, 2 * dim) if self._by_channel(what) else (PAGE, 2 * -(-dim // self.group))

    def encode(self, x: Tensor, what: str) -> tuple[Tensor, Tensor]:
        """See `Format`."""
        x, dim = self._bounded(x, what), x.shape[-1]
        if by_channel := self._by_channel(what):
            groups = x.unflatten(2, (-1, self.group)).transpose(3, 4)  # [Hkv, n, R, D, group]
        else:
            # Copies of the last number fill the last group up: they change neither its least nor its greatest.
            lacking = -dim % self.group
            groups = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], lacking)], -1) if lacking else x
            groups = groups.unflatten(3, (-1, self.group))  # [Hkv, n, PAGE, G, group]
        levels = self.levels(what)
        step, centre = self._fit(groups, levels)
        codes = _codes(groups, step, centre, levels).nan_to_num(0.0).to(torch.uint8)
        codes = codes.transpose(3, 4).flatten(2, 3) if by_channel else codes.flatten(3)[..., :dim]
        scales = torch.cat([step, centre], -2).squeeze(-1).to(self.scale_dtype)
        return _pack(codes, self.bits_of(what)), scales

    def decode(self, codes: Tensor, scales: Tensor, what: str, dim: int, dtype: torch.dtype) -> Tensor:
        """See `Format`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        step, centre = scales.to(wide).chunk(2, -1)
        base = centre - step * (self.levels(what) / 2)
        numbers = _unpack(codes, dim, self.bits_of(what)).to(wide)
        groups = numbers
        if codes.shape[:-1] != scales.shape[:-1]:  # whole pages, and several tokens to a row of scales
            groups = groups.unflatten(-2, (scales.shape[-2], -1))
            step, base = step.unsqueeze(-2), base.unsqueeze(-2)
        if not self._by_channel(what):
            if dim % self.group:
                step, base = (part.repeat_interleave(self.group, -1)[..., :dim] for part in (step, base))
            else:
                groups = groups.unflatten(-1, (-1, self.group))
                step, base = step.unsqueeze(-1), base.unsqueeze(-1)
        groups.mul_(step).add_(base)  # a view of `numbers`
        if what == "k" and self.rotate:
            numbers = hadamard.rotate(numbers)
        return numbers.to(dtype)

    def _bounded(self, x: Tensor, what: str) -> Tensor:
        """Return pages in float32 (float64 where they are) that are finite or NaN, keys rotated."""
        x = x if x.dtype == torch.float64 else x.float()
        finite = torch.where(x.isfinite(), x.abs(), torch.zeros_like(x)).amax((-1, -2), keepdim=True)
        turned = what == "k" and self.rotate
        # A rotated number is at most as large as sqrt(channels) of the largest.
        largest = _LARGEST / hadamard.mixed(x.shape[-1]) ** 0.5 if turned else _LARGEST
        finite = finite.clamp(max=largest)
        x = x.clamp(-finite, finite)
        return hadamard.rotate(x).clamp(-_LARGEST, _LARGEST) if turned else x

    def _fit(self, groups: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Return steps and centres `[..., 1]` of groups `[..., group]`."""
        low, high = groups.aminmax(dim=-1, keepdim=True)
        centre = (low / 2 + high / 2).to(self.scale_dtype).to(groups.dtype)
        return _next(torch.maximum(high - centre, centre - low) * (2 / levels)), centre


@dataclass(frozen=True)
class Int8(Integers):
    """8 bits a number: so little is lost that nothing need stay exact."""

    residual: int = 0
    sinks: int = 0

    name = "int8"
    bits = 8
    error = 0.005


class Int4(Integers):
    """4 bits a number."""

    name = "int4"
    bits = 4
    error = 0.08


class Int3(Integers):
    """3 bits a number."""

    name = "int3"
    bits = 3
    error = 0.17


class Int2(Integers):
    """2 bits a number."""

    name = "int2"
    bits = 2
    error = 0.4


def _next(x: Tensor) -> Tensor:
    """Return the bfloat16 numbers, in x's float type, that are next above x >= 0 (or a millionth below it)."""
    # A number that is one already but for rounding must not grow each time it is written again.
    bits = (x.float() * (1 - 2.0**-20)).view(torch.int32)
    above = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).clamp(max=_LARGEST)
    return torch.where(x.isnan(), x, above.to(x.dtype))


def _codes(groups: Tensor, step: Tensor, centre: Tensor, levels: int) -> Tensor:
    """Return the nearest levels' codes, NaN where a group is."""
    # A group of one number throughout has step 0, and comes back as its centre whatever the code.
    scaled = (groups - centre) / torch.where(step > 0, step, torch.ones_like(step))
    return (scaled + levels / 2).round().clamp(0, levels)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes `[..., D]` as bytes `[..., C]`."""
    packed, low = [], 0
    for part in _PARTS[bits]:
        packed.append(_packed((codes >> low) & (2**part - 1), part))
        low += part
    return packed[0] if len(packed) == 1 else torch.cat(packed, -1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    each = 8 // bits
    if each == 1:
        return codes
    lacking = -codes.shape[-1] % each
    codes = torch.nn.functional.pad(codes, (0, lacking)).unflatten(-1, (-1, each))
    packed = codes[..., 0].clone()
    for place in range(1, each):
        packed |= codes[..., place] << (place * bits)
    return packed


def _unpack(codes: Tensor, dim: int, bits: int) -> Tensor:
    """Return bytes `[..., C]` as float32 `[..., D]`."""
    first, *others = _PARTS[bits]
    start, low = -(-dim * first // 8), first
    numbers = _unpacked(codes[..., :start], dim, first)
    for part in others:
        stop = start - (-dim * part // 8)
        numbers = numbers.add_(_unpacked(codes[..., start:stop], dim, part), alpha=2**low)
        start, low = stop, low + part
    return numbers


def _unpacked(codes: Tensor, dim: int, bits: int) -> Tensor:
    each = 8 // bits
    if each == 1:
        return codes.float()
    # One look-up a byte of all the numbers in it at once: half the time of shifting and masking.
    found = _numbers(bits, codes.device).index_select(0, codes.flatten().int()).view(torch.float32)
    found = found.view(*codes.shape[:-1], -1)
    return found if found.shape[-1] == dim else found[..., :dim].contiguous()


@lru_cache(maxsize=16)
def _numbers(bits: int, device: torch.device) -> Tensor:
    """Return for each byte the numbers in it, float32, in the guise of numbers of 8 or 16 bytes `[256]`, `[256, 2]`."""
    with torch.inference_mode(False):
        places = torch.arange(8 // bits) * bits
        table: Tensor = ((torch.arange(256).unsqueeze(1) >> places) & (2**bits - 1)).float()
        return table.view({4: torch.float64, 2: torch.complex128, 1: torch.complex128}[bits]).squeeze(1).to(device)
