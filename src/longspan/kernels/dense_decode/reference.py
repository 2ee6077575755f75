"""Attention of the newest token of every sequence to all its keys, in plain PyTorch: the truth for its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.append import turned
from longspan.kernels.held import Held


def decode(q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, per_token: Tensor | None = None) -> Tensor:
    """Attend from the newest token of every sequence.

    Args:
        q: `[B, Hq, D]`, unrotated.
        k: keys, rotated to their positions if there is `per_token`.
        v: values.
        lengths: int64 `[B]`, tokens of each sequence, the newest included.
        scale: what scores are multiplied by.
        per_token: float64 `[R / 2]`, by how many turns a token each pair of channels is rotated; None: not at all.

    Returns:
        `[B, Hq, Dv]` in q's type; computed in float32 (float64 where q is).
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.heads
    out = torch.empty(*q.shape[:2], v.dim, dtype=q.dtype, device=q.device)
    for b, n in enumerate(lengths.tolist()):
        query = q[b : b + 1]
        if per_token is not None:
            query = turned(query, lengths[b : b + 1] - 1, per_token)
        keys, values = k.gathered(b, n).to(kind), v.gathered(b, n).to(kind)
        scores = query[0].to(kind).unflatten(0, (k.heads, group)) @ keys.mT * scale
        out[b] = (torch.softmax(scores, -1) @ values).flatten(0, 1).to(q.dtype)
    return out
