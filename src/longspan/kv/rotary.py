"""Rotary position embedding (RoFormer, arXiv 2104.09864, equation 34) applied when a key is read, not when it is kept.

Keys and queries arrive unrotated; a mechanism rotates each to the position it reads it at. Rotations compose and only
the difference between the query's and the key's position enters a score, so a page can be read anywhere.
Angles are computed in float64: at position 10M a float32 angle would be off by half a radian.
It does not know which position a key should have: mechanisms decide.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

_Kept = OrderedDict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]]


class Rotary:
    """Rotates the first `2 * len(inv_freq)` channels of a head; channel i is paired with channel i + half."""

    _KEPT = 8  # ranges of angles kept: all layers of one chunk ask for the same few
    _KEPT_ROWS = 64  # single rows' kept: all layers of a step ask for those of every context that takes it

    def __init__(self, inv_freq: Tensor, trained_length: int | None = None) -> None:
        """Take the frequencies `[R/2]` in radians a token and the number of positions the model was trained on."""
        self.inv_freq = inv_freq.detach().double().cpu()
        self.trained_length = trained_length
        self._turns: Tensor | None = None
        self._frequencies = {self.inv_freq.device: self.inv_freq}
        """By device: a copy to a GPU waits for all that it has yet to do."""
        self._ranges, self._rows = _Kept(), _Kept()
        self._latest: tuple[Tensor, int, Tensor] | None = None
        """The single row that was rotated last: what searches for keys and what reads them rotate the same query."""

    @property
    def dim(self) -> int:
        """Number of channels that are rotated."""
        return 2 * self.inv_freq.numel()

    def turns(self, device: torch.device) -> Tensor:
        """Return by how many turns a token each pair of channels is rotated, float64 `[R/2]`, for kernels."""
        if self._turns is None or self._turns.device != device:
            self._turns = (self.inv_freq / (2 * math.pi)).to(device)
        return self._turns

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x `[..., N, D]` to integer positions `[N]` or any shape that broadcasts to `[..., N]`."""
        return self.turn(x, self.angles(positions, x))

    def angles(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `turn` takes to rotate tensors like x (device, type) to these positions."""
        return self._angles(positions, x.device, _angle_dtype(x))

    def turn(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate x `[..., N, D]` by what `angles` returned for its positions."""
        return self._rotate(x, *angles)

    def range(self, x: Tensor, start: int) -> Tensor:
        """Rotate x `[..., N, D]` to the positions `start .. start + N - 1`."""
        found = self._latest
        if found is not None and found[0] is x and found[1] == start:
            return found[2]
        stop, dtype = start + x.shape[-2], _angle_dtype(x)
        key = (start, stop, x.device, dtype)
        kept, most = (self._rows, self._KEPT_ROWS) if stop == start + 1 else (self._ranges, self._KEPT)
        if key not in kept:
            kept[key] = self._angles(torch.arange(start, stop, device=x.device), x.device, dtype)
            if len(kept) > most:
                kept.popitem(last=False)
        kept.move_to_end(key)
        out = self._rotate(x, *kept[key])
        if stop == start + 1:
            self._latest = x, start, out
        return out

    def averaged(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Apply the mean of the rotations to the positions `start .. stop - 1` to x `[..., D]`."""
        cos, sin = self.angles(torch.arange(start, stop, device=x.device), x)
        return self._rotate(x, cos.mean(0), sin.mean(0))

    def _angles(self, positions: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = self._frequencies.get(device)
        if frequencies is None:
            frequencies = self._frequencies[device] = self.inv_freq.to(device)
        angles = positions.to(device).double().unsqueeze(-1) * frequencies
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate by cosines and sines `[..., R]`, those of the first half negative: `x cos + swapped(x) sin`."""
        wide, rotated = x.to(cos.dtype), cos.shape[-1]
        turning = wide if rotated == x.shape[-1] else wide[..., :rotated]
        turned = torch.addcmul(turning * cos, turning.roll(rotated // 2, -1), sin)
        if rotated < x.shape[-1]:
            turned = torch.cat([turned, wide[..., rotated:]], -1)
        return turned.to(x.dtype)


def _angle_dtype(x: Tensor) -> torch.dtype:
    """Angles are applied in float32, or float64 where x is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
