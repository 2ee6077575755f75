"""When a Triton kernel may stand in for plain PyTorch."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None


def triton_serves(*tensors: Tensor | None) -> bool:
    """Return whether Triton is there, and all tensors are on its GPU, of at most 32 bits, and want no gradient."""
    given = [x for x in tensors if x is not None]
    if not _TRITON or not all(x.is_cuda and x.dtype != torch.float64 for x in given):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
