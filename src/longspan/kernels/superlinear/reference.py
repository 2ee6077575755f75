"""Superlinear attention in plain PyTorch, one query after the other: the truth for its kernels.

The equations are those of `attention/superlinear.py` (arXiv 2601.18401); the signatures those of the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.superlinear.search import Search


def decode(
    q: Tensor, k: Held, v: Held, lengths: Tensor, search: Search, *, scale: float,
    routing_query: Tensor | None = None, search_keys: Held | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the newest token of every sequence.

    Args:
        q: `[B, Hq, D]`, rotated to its position if the model rotates.
        k: keys at their positions.
        v: values.
        lengths: int64 `[B]`, tokens of each sequence, the newest included.
        search: which keys are read, and the gate.
        scale: what the scores of attention (not of the search) are multiplied by.
        routing_query: `[B, Hq, D]` that searches; None: q.
        search_keys: unrotated keys, which are searched; None: k.

    Returns:
        `[B, Hq, Dv]` in float32 (float64 where q is).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    routing = q if routing_query is None else routing_query
    searched = k if search_keys is None else search_keys
    out = torch.empty(*q.shape[:2], v.dim, dtype=dtype, device=q.device)
    for b, n in enumerate(lengths.tolist()):
        keys, values = k.gathered(b, n).to(dtype), v.gathered(b, n).to(dtype)
        anchor_keys = searched.gathered(b, n).to(dtype)
        for h in range(q.shape[1]):
            i = h // (q.shape[1] // k.heads)
            out[b, h] = _row(q[b, h].to(dtype), routing[b, h].to(dtype), keys[i], values[i], anchor_keys[i], search, scale)
    return out


def spans_of(routing: Tensor, anchor_keys: Tensor, search: Search) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return the search scores and the spans (first and last key) of one query, best first.

    Args:
        routing: `[D]`, the query that searches, of the token after which `anchor_keys` `[n, D]` end.
        anchor_keys: unrotated keys of all tokens that it sees.
        search: its options.
    """
    n = anchor_keys.shape[0]
    anchors = n - search.steps(n, anchor_keys.device).long()
    scores = anchor_keys[anchors] @ routing
    order = torch.argsort(scores, descending=True, stable=True)[: search.spans]
    backward, forward = search.reach(n)
    chosen = anchors[order].tolist()
    return scores[order], [(max(0, a - backward), min(a + forward, n - 1 - search.window)) for a in chosen]


def _row(
    q: Tensor, routing: Tensor, k: Tensor, v: Tensor, anchor_keys: Tensor, search: Search, scale: float
) -> Tensor:
    n = k.shape[0]
    near = torch.zeros(n, dtype=torch.bool, device=q.device)
    near[max(0, n - search.window) :] = True
    near[: search.sinks] = True
    scores, spans = spans_of(routing, anchor_keys, search)
    reads = []
    for first, last in spans:
        read = near.clone()
        read[first : last + 1] = True
        reads.append(read)
    if not reads or search.gate == "joint":
        return _softmax_over(q, k, v, torch.stack([near, *reads]).any(0), scale)
    outs = torch.stack([_softmax_over(q, k, v, read, scale) for read in reads])
    return torch.softmax(scores, 0) @ outs


def _softmax_over(q: Tensor, k: Tensor, v: Tensor, read: Tensor, scale: float) -> Tensor:
    return torch.softmax(k[read] @ q * scale, 0) @ v[read]
