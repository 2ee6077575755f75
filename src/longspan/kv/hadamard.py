"""Rotation by a Hadamard matrix over the channels of a head, before numbers are quantised and after they are read.

`x H` with `H = h / sqrt(n)`, `h` Sylvester's matrix of +-1 of size n (QuaRot, arXiv 2404.00456, section 3): orthonormal
and symmetric, so that it is its own inverse. Every channel becomes a mix of all, and none of them an outlier. Where the
head size is no power of two, channels are mixed within blocks of the largest power of two that divides it; blocks of
size 1 are not rotated at all.
It does not know positions: a Hadamard matrix does not commute with rotary embeddings, so that what was rotated here
must be rotated back before a position is given to it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def mixed(dim: int) -> int:
    """Return how many channels are mixed with one another: the largest power of two that divides `dim`."""
    return dim & -dim


def rotate(x: Tensor) -> Tensor:
    """Return x `[..., D]` (float32 or float64) rotated, which is also how it is rotated back."""
    size = mixed(x.shape[-1])
    if size == 1:
        return x
    turned: Tensor = x.unflatten(-1, (-1, size)) @ matrix(size, x.dtype, x.device)
    return turned.flatten(-2)


@lru_cache(maxsize=16)
def matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal Hadamard matrix `[size, size]`; `size` is a power of two."""
    assert size > 0 and size & (size - 1) == 0, f"no Hadamard matrix of size {size}"
    with torch.inference_mode(False):  # it outlives the call, and who asks next may be training
        signs = torch.ones(1, 1, dtype=torch.float64)
        while signs.shape[0] < size:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        found: Tensor = signs / size**0.5
        return found.to(device, dtype)
