"""Search scores of chosen anchors, and their gradients, in plain PyTorch: the truth for faster versions.

The score of an anchor a is `q . k[a]`. It does not know how anchors were chosen, nor what their scores weigh.
"""

from __future__ import annotations

import torch
from torch import Tensor


def anchor_scores(q: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
    """Return the score of each anchor.

    Args:
        q: routing queries `[B, Hq, T, D]`, any float type; computed in float32 (float64 stays float64).
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        anchors: integers `[B, Hq, T, S]`, from 0 to N - 1.

    Returns:
        `[B, Hq, T, S]` in the computing type.
    """
    return (_keys(k, anchors).to(_computing(q)) * q.to(_computing(q)).unsqueeze(3)).sum(-1)


def anchor_scores_backward(q: Tensor, k: Tensor, anchors: Tensor, d_scores: Tensor, dk: Tensor) -> Tensor:
    """Add the keys' gradients to `dk`, and return the queries'.

    Args:
        q: as in `anchor_scores`.
        k: as there.
        anchors: as there.
        d_scores: `[B, Hq, T, S]`, gradient of each score; 0 where there is no anchor (`anchors` may then be any key).
        dk: `[B, Hkv, N, D]`, any float type, changed.

    Returns:
        `[B, Hq, T, D]` in the computing type.
    """
    each = d_scores.to(_computing(q)).unsqueeze(-1)
    dq = (_keys(k, anchors).to(each.dtype) * each).sum(-2)
    rows = (q.to(each.dtype).unsqueeze(3) * each).view(k.shape[0], k.shape[1], -1, q.shape[-1])
    at = anchors.reshape(*rows.shape[:3], 1).long().expand_as(rows)
    dk += torch.zeros(dk.shape, dtype=each.dtype, device=dk.device).scatter_add(2, at, rows).to(dk.dtype)
    return dq


def _keys(k: Tensor, anchors: Tensor) -> Tensor:
    """Return the keys of the anchors, `[B, Hq, T, S, D]`."""
    at = anchors.reshape(k.shape[0], k.shape[1], -1, 1).long().expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, at).view(*anchors.shape, k.shape[-1])


def _computing(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
