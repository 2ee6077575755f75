"""Chosen blocks on any device: rows that read equally many of them are one product, their own blocks another, merged.

A row is a block of queries of one head. Rows whose lists are of one length need no mask, and their blocks are gathered
side by side; the parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention import merge_partials, partial_attention

_PIECE = 1 << 24
"""Numbers of working memory that keys gathered together may take (64 MiB in float32)."""


def block_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, scale: float) -> Tensor:
    """Attend from whole blocks of queries; arguments and results as in the reference."""
    count = q.shape[2]
    block = count // chosen.shape[2]
    out, lse = _attend_own(q, k[:, :, -count:], v[:, :, -count:], block, scale)
    past = k.shape[2] - block
    if past == 0:
        return out
    far, far_lse = _attend_chosen(q, k[:, :, :past], v[:, :, :past], chosen, block, scale)
    return merge_partials(torch.stack([far, out]), torch.stack([far_lse, lse]))[0]


def _attend_own(q: Tensor, k: Tensor, v: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from each block of queries to itself, causally."""
    count = q.shape[2]
    triangle = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    # Blocks become entries of the batch.
    q, k, v = (x.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out, lse = partial_attention(q, k, v, triangle, scale=scale)
    batch = q.shape[0] * block // count
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return out, lse.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _attend_chosen(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from blocks of queries `[B, Hq, T, D]` to the whole blocks of keys that were chosen for them."""
    batch, heads, count, dim = q.shape
    kv_heads = k.shape[1]
    rows = q.reshape(batch, kv_heads, -1, block, dim)  # [B, Hkv, heads of a group * blocks, block, D]
    out = q.new_zeros(*rows.shape[:-1], v.shape[-1])
    lse = q.new_full(rows.shape[:-1], float("-inf"))
    numbers = chosen.sum(-1).view(rows.shape[:3])
    first = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).view(*rows.shape[:3], -1)
    for b in range(batch):
        for h in range(kv_heads):
            # A block is one row of memory here, so that gathering it is one plain copy.
            keys, values = (x[b, h].unflatten(0, (-1, block)).flatten(1) for x in (k, v))
            by_number = numbers[b, h].argsort(stable=True)
            distinct, many = numbers[b, h, by_number].unique_consecutive(return_counts=True)
            for number, some in zip(distinct.tolist(), by_number.split(many.tolist()), strict=True):
                if number == 0:
                    continue
                for at in some.split(max(1, _PIECE // (number * block * dim))):
                    blocks = first[b, h, at, :number].flatten()
                    part_k, part_v = (
                        x.index_select(0, blocks).view(len(at), 1, number * block, -1) for x in (keys, values)
                    )
                    part = partial_attention(rows[b, h, at].unsqueeze(1), part_k, part_v, scale=scale)
                    out[b, h, at], lse[b, h, at] = part[0].squeeze(1), part[1].squeeze(1)
    return out.view(batch, heads, count, -1), lse.view(batch, heads, count)
