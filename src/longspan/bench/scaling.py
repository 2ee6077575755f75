"""How times grow with the context: a fitted exponent, and where one side overtakes another.

Both in log-log, where a power law is a straight line. It does not know what was timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def exponent(seconds: Mapping[int, float]) -> float | None:
    """Return b of the least-squares fit `seconds ~ a length^b`; None: fewer than two lengths."""
    if len(seconds) < 2:
        return None
    x = [math.log(length) for length in seconds]
    y = [math.log(value) for value in seconds.values()]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - middle_x) ** 2 for a in x)


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Return from which length on we are the faster side, interpolated between the lengths measured.

    Args:
        ours: seconds by length.
        theirs: the same of the other side; lengths that only one side has are left out.

    Returns:
        `{"length": n}`, where the ratio of times last passes 1 in our favour; `{"length": None, "faster": "always"}`
        or `"never"` where it passes nowhere between the lengths measured; None: no length is common.
    """
    common = sorted(set(ours) & set(theirs))
    if not common:
        return None
    gain = [math.log(theirs[length] / ours[length]) for length in common]
    if gain[-1] <= 0:
        return {"length": None, "faster": "never"}
    for i in range(len(common) - 1, 0, -1):
        if gain[i - 1] <= 0:
            share = -gain[i - 1] / (gain[i] - gain[i - 1])
            low, high = math.log(common[i - 1]), math.log(common[i])
            return {"length": round(math.exp(low + share * (high - low)))}
    return {"length": None, "faster": "always"}
