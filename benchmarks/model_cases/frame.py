"""A case of `benchmarks.model_kernels`, and what helps to make one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BEYOND_CACHE = 160 << 20
"""Bytes of inputs that are gone through before any comes again: three times Hopper's second cache."""


@dataclass(frozen=True)
class Options:
    """What every case may depend on."""

    tokens: int
    """New tokens of a prefill chunk."""
    batches: tuple[int, ...]
    """Sequences of a decode step."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Case:
    """One row: what is called, what it must return, and what it costs at least."""

    name: str
    calls: Sequence[Callable[..., Any]]
    """The operation on inputs that differ; a tile's options are given by name."""
    found: Callable[..., Sequence[Tensor]]
    """Runs the operation on fresh inputs, and returns what is compared; takes a tile's options too."""
    wanted: Callable[[], Sequence[Tensor]]
    """What `found` must return, in float32 or float64."""
    bytes: float
    """Bytes that must be moved: every input read once, every output written once."""
    flops: float = 0.0
    graph: bool = False
    """Whether it is timed in a CUDA graph."""
    tolerance: float = 1e-2
    """Largest relative error, by norm."""


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Return random numbers on the GPU."""
    return (torch.randn(*shape, device="cuda") * scale + shift).to(dtype)


def rounds(bytes_a_set: float) -> int:
    """Return how many sets of inputs are more than the second cache holds."""
    return max(1, min(64, math.ceil(BEYOND_CACHE / bytes_a_set)))
