"""One block of attention on one rank, with the log-sum-exp that lets it merge, by the fastest way there is.

On a GPU: cuDNN's or FlashAttention's kernel (`kernels/causal_attention/cuda.py`), which read a GQA group's keys once
and give float32 log-sum-exps, but outputs in the queries' type. On a CPU: tiles of queries, so that the scores of a
whole block are never written out. Its gradients, given the output and the log-sum-exp over ALL keys of the ring, are
the block's share of the whole's (FlashAttention-2, arXiv 2307.08691, section 3.1): with `P = exp(S - l)` and `delta =
sum_d dO O`, `dV = P^T dO`, `dS = P (dO V^T - delta)`, `dQ = dS K scale`, `dK = dS^T Q scale`. It knows no ranks and no
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.causal_attention import cuda
from longspan.kernels.partial_attention import merge_partials, partial_attention

_TILE = 512
"""Queries of a causal block that are read together on a CPU."""


def computed(x: Tensor) -> torch.dtype:
    """Return the type in which what x attends to is summed up."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attend_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend to a block.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, N, D]`; query head h reads KV head `h // (Hq // Hkv)`.
        v: `[B, Hkv, N, Dv]`.
        scale: what scores are multiplied by.
        causal: N is T, and query i sees keys 0..i; False: every query sees every key.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`: the output in q's type or the computing type, the log-sum-exp in the
        computing type.
    """
    if cuda.serves(q, k, v):
        return cuda.part(q, k, v, scale, causal=causal)
    q = q.to(computed(q))
    if not causal:
        return partial_attention(q, k, v, scale=scale)
    outs, lses = [], []
    for start in range(0, q.shape[2], _TILE):
        rows = q[:, :, start : start + _TILE]
        stop = start + rows.shape[2]
        triangle = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        near = partial_attention(rows, k[:, :, start:stop], v[:, :, start:stop], triangle, scale=scale)
        if start:
            far = partial_attention(rows, k[:, :, :start], v[:, :, :start], scale=scale)
            near = merge_partials(torch.stack([far[0], near[0]]), torch.stack([far[1], near[1]]))
        outs.append(near[0])
        lses.append(near[1])
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))


def part_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's share of the gradients of q, k and v.

    Args:
        grad: of the whole output, `[B, Hq, T, Dv]`.
        q: as in `attend_part`, as are k and v.
        k: see q.
        v: see q.
        out: the whole output, over all keys.
        lse: `[B, Hq, T]`, over all keys.
        scale: as in `attend_part`.
        causal: as in `attend_part`.

    Returns:
        Shapes of q, k and v; in their types where a fused kernel serves, else in the computing type.
    """
    if cuda.serves(q, k, v):
        return cuda.part_gradients(grad, q, k, v, out, lse, scale, causal=causal)
    dtype = computed(q)
    batch, heads, count, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (k, v))
    k, v = k.to(dtype), v.to(dtype)
    for start in range(0, count, _TILE):
        stop = min(count, start + _TILE)
        seen = stop if causal else k.shape[2]
        # The queries of a group are more queries of their KV head: [B, Hkv, G * T, ...].
        own, up = (x[:, :, start:stop].to(dtype).reshape(batch, kv_heads, -1, x.shape[-1]) for x in (q, grad))
        own_lse, own_delta = (x[:, :, start:stop].to(dtype).reshape(batch, kv_heads, -1, 1) for x in (lse, delta))
        keys, values = k[:, :, :seen], v[:, :, :seen]
        weights = torch.exp(own @ keys.mT * scale - own_lse)
        if causal:
            hidden = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(start + 1)
            weights = weights.masked_fill(hidden.repeat(group, 1), 0.0)
        dv[:, :, :seen] += weights.mT @ up
        scores = weights * (up @ values.mT - own_delta) * scale
        dq[:, :, start:stop] = (scores @ keys).view(batch, heads, stop - start, dim)
        dk[:, :, :seen] += scores.mT @ own
    return dq, dk, dv
