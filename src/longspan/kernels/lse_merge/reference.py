"""Partial outputs and their log-sum-exps merged two by two, in plain PyTorch: the truth that kernels are tested by.

With `o_a, l_a` and `o_b, l_b` over keys that share none: `l = log(exp(l_a) + exp(l_b))` and
`o = exp(l_a - l) o_a + exp(l_b - l) o_b` (FlashAttention, arXiv 2205.14135, section 3.1), written so that no
exponential overflows and a part without keys (log-sum-exp -inf) weighs nothing, whatever its output holds.

A part may come in a half type; what is summed up is float32 (float64 where the queries are). Two parts merge to the
same bits in either order, so that ranks which merge the same parts hold the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention.reference import merge_partials


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts.

    Args:
        out: `[..., Dv]`, any float type.
        lse: `[...]`, natural logarithm, float32 or float64; -inf: no keys.
        other: as `out`.
        other_lse: as `lse`.

    Returns:
        `(out, lse)` in the type of `lse`.
    """
    new = torch.logaddexp(lse, other_lse)
    return _weighed(out, lse, new) + _weighed(other, other_lse, new), new


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part into what has been summed up, in place.

    Args:
        out: `[B, H, T, Dv]`, float32 or float64; may be a view.
        lse: `[B, H, T]` of the same type; may be a view.
        part: `[B, H, T, Dv]`, any float type.
        part_lse: `[B, H, T]`.
    """
    new_out, new_lse = merged(out, lse, part, part_lse.to(lse.dtype))
    out.copy_(new_out)
    lse.copy_(new_lse)


def merge_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the parts of several ranks, as one message brings them.

    Args:
        packed: `[P, ..., Dv + 1]`: outputs, and behind each its log-sum-exp; float32 or float64.

    Returns:
        `(out [..., Dv], lse [...])`. Where no part has a key: 0 and -inf.
    """
    return merge_partials(packed[..., :-1], packed[..., -1])


def _weighed(out: Tensor, lse: Tensor, new: Tensor) -> Tensor:
    # Where no part has a key, -inf - -inf would be NaN.
    weight = torch.exp(lse - new.masked_fill(new == float("-inf"), 0.0)).unsqueeze(-1)
    return torch.where(weight == 0, 0.0, weight * out.to(weight.dtype))
