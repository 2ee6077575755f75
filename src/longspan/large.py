"""Memory for what is large: in large pages where the system has them, since small ones take time to make.

Belongs to all rooms.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 4 * 2**20
"""Bytes below which it makes no difference."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return a tensor whose contents mean nothing, and which can be written to whether a model runs or not."""
    count = math.prod(shape) * dtype.itemsize
    with torch.inference_mode(False):
        if count < LEAST or (device is not None and device.type != "cpu") or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        made = mmap.mmap(-1, count)
        with contextlib.suppress(OSError):
            made.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(made, dtype=dtype).view(tuple(shape))
