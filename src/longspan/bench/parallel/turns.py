"""Times a call on all ranks at once: a turn's time is the slowest rank's, between barriers.

It does not know what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from longspan.distributed.group import Group

_MOST = 20


def turns(group: Group, call: Callable[[], object], seconds: float) -> list[float]:
    """Return the seconds of calls, the slowest rank's of each, until they have taken so long together."""
    found: list[float] = []
    while len(found) < _MOST and (not found or sum(found) + found[-1] <= seconds):
        synchronize(group)
        group.barrier()
        began = time.perf_counter()
        call()
        synchronize(group)
        found.append(slowest(group, time.perf_counter() - began))
    return found


def slowest(group: Group, value: float) -> float:
    """Return the greatest of all ranks' values."""
    told = torch.tensor([value], dtype=torch.float64, device=group.device)
    return float(group.reduce(told, "max"))


def synchronize(group: Group) -> None:
    """Wait until this rank's device has done everything."""
    if group.device.type == "cuda":
        torch.cuda.synchronize()
