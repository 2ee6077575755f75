"""Superlinear attention in plain PyTorch, one query after the other: the truth for its kernels.

The equations are those of `attention/superlinear.py` (arXiv 2601.18401); the signatures those of the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.kernels.held import Held
from longspan.kernels.superlinear.search import Search, Turn


def decode(
    q: Tensor, k: Held, v: Held, lengths: Tensor, search: Search, *, scale: float,
    routing_query: Tensor | None = None, search_keys: Held | None = None, turn: Turn | None = None,
) -> Tensor:  # fmt: skip
    """Attend from the newest token of every sequence.

    Args:
        q: `[B, Hq, D]`, unrotated.
        k: keys, rotated to their positions if there is a `turn`.
        v: values.
        lengths: int64 `[B]`, tokens of each sequence, the newest included.
        search: which keys are read, and the gate.
        scale: what the scores of attention (not of the search) are multiplied by.
        routing_query: `[B, Hq, D]` that searches; None: q.
        search_keys: unrotated keys, which are searched; None: k.
        turn: how queries are rotated; None: they are not.

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
        by = routing[b].to(dtype)
        if search.share == "group":  # the sum of scores is the score of the sum
            by = by.unflatten(0, (k.heads, -1)).sum(1).repeat_interleave(q.shape[1] // k.heads, 0)
        for h in range(q.shape[1]):
            i = h // (q.shape[1] // k.heads)
            row = by[h], keys[i], values[i], anchor_keys[i]
            out[b, h] = _row(q[b, h].to(dtype), *row, search, turn, scale)
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
    q: Tensor, routing: Tensor, k: Tensor, v: Tensor, anchor_keys: Tensor, search: Search, turn: Turn | None,
    scale: float,
) -> Tensor:  # fmt: skip
    n = k.shape[0]
    near = torch.zeros(n, dtype=torch.bool, device=q.device)
    near[max(0, n - search.window) :] = True
    near[: search.sinks] = True
    moved = turn is not None and n > turn.trained
    seen_from = torch.full((n,), n - 1, device=q.device)
    if moved and n > search.window:
        seen_from[: min(search.sinks, n - search.window)] = min(search.sinks, n - search.window) - 1 + search.window
    scores, spans = spans_of(routing, anchor_keys, search)
    reads = []
    # Keys that spans share are read where the span that begins first (of equals the better) reads them.
    starts = [max(first, search.sinks) for first, _ in spans]
    for j in sorted(range(len(spans)), key=lambda j: (starts[j], j), reverse=True):
        if moved:
            seen_from[starts[j] : spans[j][1] + 1] = spans[j][1] + search.window
    for first, last in spans:
        read = near.clone()
        read[first : last + 1] = True
        reads.append(read)
    if not reads or search.gate == "joint":
        return _softmax_over(q, k, v, torch.stack([near, *reads]).any(0), turn, seen_from, scale)
    outs = []
    for (first, last), read in zip(spans, reads, strict=True):
        if moved:
            seen_from[max(first, search.sinks) : last + 1] = last + search.window
        outs.append(_softmax_over(q, k, v, read, turn, seen_from, scale))
    return torch.softmax(scores, 0) @ torch.stack(outs)


def _softmax_over(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, turn: Turn | None, seen_from: Tensor, scale: float
) -> Tensor:
    rows = q.expand(int(read.sum()), -1)
    if turn is not None:
        half = turn.per_token.numel()
        angle = (2 * math.pi * seen_from[read].double().unsqueeze(-1) * turn.per_token.to(q.device)).to(q.dtype)
        a, b = rows[:, :half], rows[:, half : 2 * half]
        cos, sin = angle.cos(), angle.sin()
        rows = torch.cat([a * cos - b * sin, b * cos + a * sin, rows[:, 2 * half :]], -1)
    return torch.softmax((k[read] * rows).sum(-1) * scale, 0) @ v[read]
