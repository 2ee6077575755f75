"""Causal attention on a CPU that multiplies bfloat16 natively: two matrix products with a softmax between.

PyTorch's blocked kernel reaches a third of what its matrix products do (75 and 210 GFLOP/s of one core of an EPYC), so
the scores of a tile are written out here, as many as its cache holds. A product in bfloat16 sums in float32 but rounds
what it returns: scores of 30 would be off by 0.06. What is returned is therefore their difference from a reference of
each query, the greatest score of a few keys, subtracted within the product: then those that weigh most are near 0,
where bfloat16 is finest. Where a score exceeds its reference by more than `_NEAR`, the product is taken again from
there. It serves keys that are held in bfloat16; queries are rounded to it (they came from a model in it).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from longspan.kernels.causal_attention import reference
from longspan.kernels.partial_attention.cpu import multiplies_bfloat16
from longspan.kernels.side_by_side import side_by_side

_SCORES = 1 << 19
"""Scores of a tile: 1 MiB, what a core's own cache holds."""
_FEWEST = 32
"""Queries of a KV head from which on two products are faster than the blocked kernel."""
_MOST_KEYS = _SCORES // _FEWEST
_ASKED = 64
"""First keys (a context's sinks) that references are taken from, beside the queries' own."""
_NEAR = 4.0
"""Scores up to this are rounded by at most 0.008."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether this version computes what the reference would for these inputs (types, shapes, device)."""
    return k.shape[2] <= _MOST_KEYS and fits(q, k, v)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether products in bfloat16 serve, however many keys are read."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and k.dtype == v.dtype == torch.bfloat16
        and q.shape[1] // k.shape[1] * q.shape[2] >= _FEWEST
        and not torch.is_grad_enabled()
        and multiplies_bfloat16()
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend causally from the last positions; arguments and results as in the reference."""
    batch, heads, count, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    first = keys - count
    # The queries of a group are more queries of their KV head, and each KV head is a product of its own.
    rows = (q * scale).to(k.dtype).reshape(batch * kv_heads, -1, dim)
    hidden = torch.ones(count, count, dtype=torch.bool).triu(1).repeat(heads // kv_heads, 1)
    out = rows.new_empty(*rows.shape[:2], v.shape[-1])
    step = max(_FEWEST, _SCORES // keys)
    given, k, v = (k, v), k.flatten(0, 1), v.flatten(0, 1)

    def attend(row: int, start: int) -> None:
        at = slice(start, start + step)
        near = references(rows[row, at], k[row, :first], k[row, first:], hidden[at])
        torch.mm(weights(rows[row, at], k[row], near), v[row], out=out[row, at])

    side_by_side(attend, *zip(*itertools.product(range(len(rows)), range(0, rows.shape[1], step)), strict=True))
    out = out.view(batch, heads, count, -1).to(q.dtype)
    # A finite sum has only finite terms. What is hidden was multiplied by 0, which hides neither NaN nor infinity.
    return out if torch.isfinite(out.sum()) else reference.causal_attention(q, *given, scale=scale)


def references(q: Tensor, past: Tensor, own: Tensor, hidden: Tensor) -> Tensor:
    """Return what is added to scores: the negative of each query's reference, and -inf where a key is hidden.

    Args:
        q: scaled queries `[..., M, D]`.
        past: keys `[..., N - C, D]` that all of them see.
        own: the C newest keys `[..., C, D]`, of which each query sees one at least.
        hidden: which of these a query does not see, bool `[M, C]`.

    Returns:
        `[..., M, C]` for the newest keys.
    """
    greatest = torch.matmul(q, own.mT).masked_fill_(hidden, float("-inf")).amax(-1, keepdim=True)
    if past.shape[-2]:
        sinks = torch.matmul(q, past[..., :_ASKED, :].mT).amax(-1, keepdim=True)
        greatest = torch.maximum(greatest, sinks)
    return greatest.neg_().expand(*greatest.shape[:-1], own.shape[-2]).masked_fill(hidden, float("-inf"))


def weights(q: Tensor, k: Tensor, near: Tensor) -> Tensor:
    """Return the softmax `[M, N]` of scaled queries `[M, D]` over keys `[N, D]`; `near` as `references` returns it."""
    far = k.shape[0] - near.shape[1]
    scores = torch.cat([near[:, :1].expand(-1, far), near], 1).addmm_(q, k.T)
    # Where the greatest is positive, its bits are the greatest integer too, which is found seven times as fast. Where
    # none is, what is found is negative.
    above = scores.view(torch.int16).amax(1, keepdim=True).view(scores.dtype)
    if bool((above > _NEAR).any()):
        near = near - above.clamp_(min=0)
        scores = torch.cat([near[:, :1].expand(-1, far), near], 1).addmm_(q, k.T)
    return torch.softmax(scores, 1)
