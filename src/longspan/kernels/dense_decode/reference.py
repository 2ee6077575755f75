"""Attention of the newest token of every sequence to all its keys, in plain PyTorch: the truth for its kernels.

`partial` gives the log-sum-exp beside it, so that a sequence whose keys lie on several ranks is attended to by parts.
"""

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
    return partial(q, k, v, lengths, scale=scale, turn_at=lengths - 1, per_token=per_token)[0].to(q.dtype)


def partial(
    q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, turn_at: Tensor | None = None,
    per_token: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from one token of every sequence to keys that all are before it.

    Args:
        q: as in `decode`, as are k, v and scale.
        k: see q.
        v: see q.
        lengths: int64 `[B]`, keys of each sequence; there may be none.
        scale: see q.
        turn_at: int64 `[B]`, the queries' positions, where there is `per_token`.
        per_token: as in `decode`.

    Returns:
        `(out [B, Hq, Dv], lse [B, Hq])` in float32 (float64 where q is); 0 and -inf where there are no keys.
    """
    kind = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.heads
    out = torch.empty(*q.shape[:2], v.dim, dtype=kind, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=kind, device=q.device)
    for b, n in enumerate(lengths.tolist()):
        query = q[b : b + 1]
        if per_token is not None:
            assert turn_at is not None, "what is turned has a position"
            query = turned(query, turn_at[b : b + 1], per_token)
        keys, values = k.gathered(b, n).to(kind), v.gathered(b, n).to(kind)
        scores = query[0].to(kind).unflatten(0, (k.heads, group)) @ keys.mT * scale
        lse[b] = torch.logsumexp(scores, -1).flatten(0, 1)
        out[b] = (torch.softmax(scores, -1) @ values).flatten(0, 1)
    return out, lse
