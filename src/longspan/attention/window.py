"""The window, and the few far keys that are read beside it: what streaming and retrieval share.

The window of a query at t is the keys `t - window + 1 .. t`, at their true distances. Far keys are given by index;
those older than the window are read as if they stood, in order, directly before it (positions counted inside the cache,
as in StreamingLLM): with f far keys older than the window, the i-th stands at position i and the query at
`f + min(window, t + 1) - 1`. Where nothing lies between far keys and window these are the true positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention import partial_attention
from longspan.kv.base import LayerKV


def attend_window(q: Tensor, kv: LayerKV, first: int, window: int | Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the window alone.

    Args:
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`.
        kv: the layer.
        first: position of the first query.
        window: keys that each query sees, its own included; a tensor `[T]`: each its own number.
        scale: what scores are multiplied by.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`.
    """
    stop = first + q.shape[2]
    spread = torch.as_tensor(window).expand(q.shape[2])
    oldest = max(0, int((torch.arange(first, stop) - spread).min()) + 1)
    q = kv.queries_from(q, first)
    k = kv.keys_at_own_positions(oldest, stop)
    v = kv.values(oldest, stop)
    if q.shape[2] == 1:
        return partial_attention(q, k, v, scale=scale)
    at = torch.arange(first, stop, device=q.device)
    keys_at = torch.arange(oldest, stop, device=q.device)
    mask = (keys_at <= at.unsqueeze(1)) & (keys_at > (at - spread.to(q.device)).unsqueeze(1))
    return partial_attention(q, k, v, mask, scale=scale)


def attend_far(
    q: Tensor, kv: LayerKV, first: int, window: int, far: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """Attend to those of the far keys that are older than each query's window.

    Args:
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`.
        kv: the layer.
        first: position of the first query.
        window: as in `attend_window`.
        far: int64 `[F]`, indexes of tokens, ascending, each once.
        scale: what scores are multiplied by.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`, or None where no query of the tile has a far key.
    """
    stop = first + q.shape[2]
    far = far[far <= stop - 1 - window]
    if far.numel() == 0:
        return None
    count = far.numel()
    begin, end = int(far[0]), int(far[-1]) + 1
    # Neighbours, such as sinks, lie as they are read.
    if end - begin == count:
        k, v = kv.keys(begin, end), kv.values(begin, end)
    else:
        k, v = kv.gather_keys(far), kv.gather_values(far)
    if kv.rotary is not None:
        k = kv.rotary.range(k, 0)
    if stop == first + 1:
        return partial_attention(kv.queries_from(q, count + min(stop, window) - 1), k, v, scale=scale)
    at = torch.arange(first, stop)
    mask = far <= at.unsqueeze(1) - window
    older = mask.sum(1)
    q = kv.queries_at(q, older + torch.clamp(at + 1, max=window) - 1)
    whole = bool(mask.all())
    return partial_attention(q, k, v, None if whole else mask.to(q.device), scale=scale)
