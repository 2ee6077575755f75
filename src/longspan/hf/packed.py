"""Weights in 4-bit codes for a CPU that multiplies one token: fewer bytes to read, and the same numbers.

In decode every weight is read for one multiplication, so that a step takes as long as its bytes. Weights that came
from a 4-bit file (GGUF's Q4_0, Q4_1) lie on grids: within 32 neighbours of a row each is `zero + scale * code`, code 0
to 15. They are found as they are held, rounded to bfloat16, and put back on their grids, which costs no more than that
rounding did. Weights on grids of 255 steps (Q8_0) are two such products with one scale: `q = 16 * high + low`.
What lies on neither grid is not packed, unless the user asks for 8 bits. PyTorch's kernel sums in float32.
It does not know models or layers: `decoder.py` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Weights of a row that share a scale, as in GGUF's formats."""
_ROWS = 16
"""The kernel takes outputs in sixteens."""
LOSSLESS = 3e-3
"""Root mean square error, relative to the weights, below which they lay on the grid. Rounding weights to bfloat16 alone
costs 1.4e-3; weights that do not lie on a grid of 255 steps lose 4e-3 (if they are spread evenly) and more."""
_PIECE = 1 << 16
"""Weights looked at together: working memory stays in the CPU's cache."""
_TILE = 64
"""Rows that the kernel may interleave: pieces that are multiples of it can be packed apart."""
_TILES = 1
"""Of the layout on GPUs; a CPU asks for it and makes nothing of it."""

_PACK = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
_MULTIPLY = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)


@dataclass(frozen=True)
class PackedWeights:
    """A matrix `[out, in]` in 4-bit codes."""

    codes: Tensor
    scales: Tensor
    """`[groups, out, 2]`, scale and zero in bfloat16."""
    bits: int
    """4, or 8: then codes are those of the high halves of a row, followed by those of the low ones."""

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.codes.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x W^T` of x `[n, in]` in bfloat16, `[n, out]`; meant for n = 1."""
        assert _MULTIPLY is not None, "nothing is packed without the kernel"
        out: Tensor = _MULTIPLY(x if self.bits == 4 else torch.cat([x, x], 1), self.codes, GROUP, self.scales)
        return out


def serves(weight: Tensor) -> bool:
    """Return whether a matrix could be packed: its place, type and shape, and the kernel of this PyTorch and CPU."""
    return (
        _PACK is not None
        and _MULTIPLY is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.shape[0] % _ROWS == 0
        and weight.shape[1] % GROUP == 0
        # Elsewhere the kernel is plain loops.
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )


@torch.no_grad()
def pack(weight: Tensor, *, lossy: bool = False) -> PackedWeights | None:
    """Pack a matrix in 4 bits, else in 8, where its weights lie on such a grid.

    Args:
        weight: `[out, in]`.
        lossy: whether it is packed in 8 bits if it lies on no grid.

    Returns:
        None where it is not packed: the kernel does not serve it, or it would lose by it.
    """
    if not serves(weight):
        return None
    for grid in (_ends, _signed, _bytes):
        allowed = float("inf") if lossy and grid is _bytes else LOSSLESS
        # The first rows tell nearly always, and spare the matrix the search.
        if _pieces(weight[:_ROWS], grid)[2] <= allowed:
            codes, scales, error = _pieces(weight, grid)
            if error <= allowed:
                by_group = scales.transpose(0, 1).contiguous()
                return PackedWeights(torch.cat(codes), by_group, 8 if grid is _bytes else 4)
    return None


_Found = tuple[Tensor, Tensor, Tensor]
"""Codes `[rows, groups, 32]`, scale and zero `[rows, groups, 1]` rounded to bfloat16, all float32."""


def _ends(groups: Tensor) -> _Found:
    """Put groups on grids of 15 steps from their least to their greatest weight (Q4_1); codes 0 to 15."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    codes = ((groups - low) / ((high - low) / 15)).nan_to_num_(0.0).round_()
    # Both ends were rounded: all 32 weights together know the scale better, and its rounding moves the zero.
    middle, mean = codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
    spread = codes - middle
    scale = _rounded((spread * groups).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True))
    return codes, scale, _rounded(mean - scale * (middle - 8))


def _signed(groups: Tensor) -> _Found:
    """Put groups on grids whose code 0 is the weight furthest from zero, and code 8 zero (Q4_0)."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = torch.where(-low > high, low, high) / -8
    steps = (groups / scale).nan_to_num_(0.0).round_().clamp_(-8, 7)
    scale = _rounded((steps * groups).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True))
    return steps + 8, scale, torch.zeros_like(scale)


def _bytes(groups: Tensor) -> _Found:
    """Put groups on grids of 127 steps to both sides of zero (Q8_0); codes -127 to 127, the zero 0."""
    steps = (groups / (groups.abs().amax(-1, keepdim=True) / 127)).nan_to_num_(0.0).round_()
    scale = _rounded((steps * groups).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True))
    return steps, scale, torch.zeros_like(scale)


def _rounded(x: Tensor) -> Tensor:
    """Round to bfloat16; what is not a number (the scale of a group of equal weights) becomes 0."""
    return x.nan_to_num_(0.0).bfloat16().float()


def _pieces(weight: Tensor, grid: Callable[[Tensor], _Found]) -> tuple[list[Tensor], Tensor, float]:
    """Return a matrix on one grid: the kernel's codes, piece by piece, `[out, groups, 2]`, and the relative error."""
    assert _PACK is not None, "nothing is packed without the kernel"
    rows, wide = weight.shape
    wider = 2 if grid is _bytes else 1
    scales = torch.empty(rows, wider * wide // GROUP, 2, dtype=torch.bfloat16)
    codes, lost, held = [], 0.0, 0.0
    step = max(1, _PIECE // (wide * _TILE)) * _TILE
    for start in range(0, rows, step):
        groups = weight[start : start + step].float().unflatten(1, (-1, GROUP))
        steps, scale, zero = grid(groups)
        held += float(groups.square().sum())
        if grid is _bytes:
            lost += float(torch.addcmul(groups, steps, scale, value=-1).square_().sum())
            # With q = 16 * high + low and codes read as `code - 8`: high by 16 * scale, and low by scale, its zero up.
            high = (steps / 16).floor_()
            steps = torch.cat([high + 8, steps - 16 * high], 1)
            scale, zero = torch.cat([16 * scale, scale], 1), torch.cat([zero, 8 * scale], 1)
        else:
            lost += float(torch.addcmul(groups - zero, steps - 8, scale, value=-1).square_().sum())
        codes.append(_PACK(steps.flatten(1).int(), _TILES))
        scales[start : start + step] = torch.cat([scale, zero], -1)
    return codes, scales, (lost / held) ** 0.5 if held else 0.0
