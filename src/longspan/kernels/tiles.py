"""How a Triton kernel is cut, and how much room a chip has for it.

It does not know what a kernel computes: each chooses its tile by types and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_ROOMY = 200 << 10


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a block, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


@cache
def roomy(device: torch.device) -> bool:
    """Return whether a program may use 200 KiB of shared memory (Hopper: 227), or must do with Ada's 99."""
    if device.type != "cuda":
        return False
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(driver.active.utils.get_device_properties(index)["max_shared_mem"] >= _ROOMY)


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; elsewhere as many as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def hopper(device: torch.device) -> bool:
    """Return whether a device is a Hopper GPU: only there are copies by its engine, as written here, known to pay."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
