"""What of transformers' modules the native files of all families read in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longspan.hf.native.blocks import Norm


def norm(module: Any) -> Norm:
    """Return a module's norm."""
    return Norm(module.weight.detach(), float(module.variance_epsilon))


@torch.inference_mode(mode=False)  # the modules' weights may be trained on
@torch.no_grad()
def joined(linears: Sequence[nn.Linear]) -> Tensor:
    """Return the rows of several linear layers, one below the other; the modules read the same memory from then on."""
    rows = torch.cat([each.weight.detach() for each in linears])
    start = 0
    for each in linears:
        each.weight.data = rows[start : start + each.out_features]
        start += each.out_features
    return rows
