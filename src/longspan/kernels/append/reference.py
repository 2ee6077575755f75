"""What a layer does with one new token's rows before it attends, in plain PyTorch: the truth for faster versions.

Norms of each head's query and key (Qwen3's, where there are any), the key and value written to the page that the token
stands in, and the key once more, rotated, to the copy that readers of the whole context have. Everything that depends
on the length is read on the device, in fixed shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.held import PAGE


@dataclass(frozen=True)
class Place:
    """Where new rows go.

    Attributes:
        keys: pages `[Hkv, slots, PAGE, D]`.
        values: `[Hkv, slots, PAGE, Dv]`.
        table: int64 `[B, pages]`, each page's slot.
        rotated: rotated keys `[B, Hkv, N, D]`; None: none are kept.
        per_token: float64 `[R / 2]`, by how many turns a token each pair of channels is rotated.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    rotated: Tensor | None = None
    per_token: Tensor | None = None


def append(
    rows: Tensor,
    place: Place,
    lengths: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Keep one token of every sequence, and return its queries.

    Args:
        rows: `[B, (Hq + 2 Hkv) D]`: queries, keys, values.
        place: where keys and values go.
        lengths: int64 `[B]`, tokens that each sequence held before.
        q_weight: `[D]`, of the queries' norm; None: there is none.
        k_weight: the same of the keys.
        eps: of both.

    Returns:
        Unrotated queries `[B, Hq, D]`.
    """
    batch, (kv_heads, slots, _, dim) = rows.shape[0], place.keys.shape
    q, k, v = rows.view(batch, -1, dim).split([rows.shape[1] // dim - 2 * kv_heads, kv_heads, kv_heads], 1)
    q, k = _normed(q, q_weight, eps), _normed(k, k_weight, eps)
    slot = place.table.gather(1, (lengths // PAGE).unsqueeze(1)).squeeze(1)
    at = slot * PAGE + lengths % PAGE
    for held, new in ((place.keys, k), (place.values, v)):
        held.view(kv_heads, slots * PAGE, dim).index_copy_(1, at, new.transpose(0, 1))
    if place.rotated is not None and place.per_token is not None:
        index = lengths.view(batch, 1, 1, 1).expand(-1, kv_heads, 1, dim)
        place.rotated.scatter_(2, index, turned(k, lengths, place.per_token).unsqueeze(2))
    return q.contiguous()


def turned(x: Tensor, positions: Tensor, per_token: Tensor) -> Tensor:
    """Rotate x `[B, H, D]` to one position a sequence, int64 `[B]`; angles are float64, as in `kv.rotary`."""
    half = per_token.numel()
    angle = positions.view(-1, 1, 1).double() * per_token * (2 * math.pi)
    kind = torch.promote_types(x.dtype, torch.float32)
    cos, sin, wide = angle.cos().to(kind), angle.sin().to(kind), x.to(kind)
    a, b = wide[..., :half], wide[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, wide[..., 2 * half :]], -1).to(x.dtype)


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)
