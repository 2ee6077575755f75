"""Sparse: a window, sinks, and every stride-th key, whatever the keys hold: O(n sqrt n).

Generating Long Sequences with Sparse Transformers (arXiv 1904.10509, section 4.2): the strided pattern lets one head
attend to the newest l keys and another to `{j : (t - j) mod l = 0}`, with l close to sqrt(n). Here every head reads the
union of both, and the first keys too. A query at t, with n = t + 1, reads

- window: the keys `t - window + 1 .. t`;
- far keys: `t - i * stride` for every integer i with `window <= i * stride <= t`;
- sinks: the keys `0 .. sinks - 1`;

each key once, where `stride = ceil(sqrt(n) / density)`, a function of t alone, so that decode equals prefill.

Nothing is chosen by what is asked: this is the baseline that content-aware mechanisms must beat. Up to the trained
length the first `dense_layers` layers read everything. Positions are as `attend_indexed` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least
from longspan.attention.dense import Dense
from longspan.attention.indexed import attend_indexed, true_positions
from longspan.attention.window import attend_window
from longspan.errors import UsageError
from longspan.kv.base import PAGE, LayerKV


@dataclass(frozen=True)
class Sparse(Mechanism):
    """Reads a window, sinks and every stride-th key."""

    window: int = 1024
    """Newest keys that a query reads, its own included."""
    sinks: int = 4
    """First keys of the context that every query reads."""
    density: float = 1.0
    """Far keys a query reads, in units of sqrt(n)."""
    dense_layers: int = 0
    """First layers that read everything, up to the trained length."""

    name: ClassVar[str] = "sparse"
    about: ClassVar[str] = "a window, sinks, and one key in every sqrt(n)"
    source: ClassVar[str] = "arXiv 1904.10509"
    decode_order: ClassVar[str] = "n^0.5"
    tile: ClassVar[int] = 128
    gpu_tile: ClassVar[int] = 128

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("window", self.window, 1)
        at_least("sinks", self.sinks, 0)
        at_least("dense_layers", self.dense_layers, 0)
        if not 0 < self.density < math.inf:
            raise UsageError(f"density={self.density} must be a number above 0")

    def stride(self, t: int) -> int:
        """Return the distance between far keys of the query at t."""
        return math.ceil(math.sqrt(t + 1) / self.density)

    def far_keys(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return what queries read before their windows.

        Returns:
            `(index int64 [count, F], valid bool)`: ascending, what is not valid first (and 0); `valid` None: all are.
        """
        at = torch.arange(first, first + count).unsqueeze(1)
        strides = torch.tensor([self.stride(t) for t in range(first, first + count)]).unsqueeze(1)
        number = at // strides - (self.window - 1) // strides  # multiples of the stride from window to t
        steps = torch.arange(max(0, int(number.max())))
        far = torch.where(steps < number, at % strides + steps * strides, -1)
        sinks = torch.arange(min(self.sinks, first + count))
        fresh = (sinks <= at - self.window) & ((at - sinks) % strides != 0)
        index = torch.cat([torch.where(fresh, sinks, -1), far], 1).sort(1).values
        index = index[:, int((index < 0).sum(1).min()) :]
        valid = index >= 0
        return index.clamp(min=0), None if bool(valid.all()) else valid

    def reads_all_of(self, n: int) -> bool:
        """See `Mechanism.reads_all_of`."""
        return n <= self.window

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        count = q.shape[2]
        true = true_positions(kv, first, count)
        if true and hints.layer < self.dense_layers:
            return Dense().attend_tile(q, kv, first, scale, hints)
        index, valid = self.far_keys(first, count)
        if index.numel() == 0:
            return attend_window(q, kv, first, self.window, scale)[0]
        windows = (torch.arange(first, first + count) + 1).clamp(max=self.window)
        index = index.to(q.device).view(1, 1, count, -1)
        valid = None if valid is None else valid.to(q.device).view(1, 1, count, -1)
        return attend_indexed(q, kv, first, windows, index, valid, scale, near=True)[0]

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`; the window takes at most a half, and sinks at most a sixteenth."""
        at_least("keys", keys, PAGE)
        window, sinks = min(self.window, keys // 2), min(self.sinks, keys // 16)
        stride = max(1, -(-(n - window) // (keys - window - sinks)))
        # A little more, so that rounding can't make the stride of n one longer.
        return replace(self, window=window, sinks=sinks, density=math.sqrt(max(1, n)) / stride * (1 + 1e-9))

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; for a layer that is not dense. A stride is taken as the real number before rounding."""
        # Up to a length of `dense` every key is read; beyond, window, sinks and (n - near) density / sqrt(n) far keys.
        near, dense = self.window + self.sinks, max(self.window + self.sinks, self.density**2)
        keys = read = float(min(n, dense))
        read *= (read + 1) / 2
        if n > dense:
            root, first = math.sqrt(n), math.sqrt(dense)
            keys = near + (n - near) * self.density / root
            far = 2 / 3 * (root**3 - first**3) - 2 * near * (root - first)
            read += (n - dense) * near + self.density * far
        return Cost(
            decode_flops=shape.read_flops(keys),
            decode_bytes=keys * shape.token_bytes,
            prefill_flops=shape.read_flops(read),
            kept_bytes=n * shape.token_bytes,
            decode_keys=keys,
        )
