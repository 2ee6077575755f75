"""Linear layers on a CPU that multiply one token by whichever of PyTorch's products reads the weights faster.

In decode a layer sees one token, and its weights are read once for a handful of additions. In half types PyTorch's
`linear` treats that as a matrix product and `mv` as a matrix-vector product. Which is faster is a matter of the CPU:
1536 x 576 in bfloat16 on one core of a Xeon with AMX 0.24 and 0.14 ms, of an EPYC without 0.23 and 0.32 ms. Both sum
in float32, in other orders, so that a token's last bits may differ from those it has among others. It does not know
models.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class OneTokenLinear(nn.Linear):
    """A linear layer whose product with one token is `multiply`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b` of `[..., in]`."""
        if x.numel() != self.in_features or x.requires_grad or torch.is_grad_enabled():
            return super().forward(x)
        return multiply(self.weight, x.reshape(1, -1), self.bias).view(*x.shape[:-1], self.out_features)


def multiply(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` of x `[B, in]`, `[B, out]`; only one row is multiplied as a vector."""
    if x.shape[0] > 1 or weight.dtype.itemsize != 2 or not _vectors():
        return nn.functional.linear(x, weight, bias)
    out = torch.mv(weight, x.view(-1)).unsqueeze(0)
    return out if bias is None else out + bias


def use_one_token_linear(model: nn.Module) -> None:
    """Let every plain linear layer of a model on a CPU in a half type multiply one token so; weights stay theirs."""
    for module in model.modules():
        # A subclass (adapters, quantised weights) knows better what its product is.
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype.itemsize == 2:
            module.__class__ = OneTokenLinear


@functools.cache
def _vectors() -> bool:
    """Return whether `mv` is the faster one: measured on CPUs with AMX, and not on those with AVX512-BF16 alone."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
