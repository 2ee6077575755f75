"""Attention of many queries, each to spans of its own, without a quadratic mask.

The rows (query, query head, span) of one KV head, sorted by where their span begins, fall into groups whose spans lie
close together; each group is one small dense product over the keys between its first and its last. The work is that of
the spans plus the groups' spread, n / (rows / group) keys a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels import span_attention as kernel
from longspan.kernels.partial_attention import merge_partials, partial_attention
from longspan.kv.base import LayerKV

GROUP, GPU_GROUP = 64, 512
"""Rows computed together on a CPU, and on a GPU, where launches cost more than a wider spread of keys."""
GATHERED = 1 << 28
"""Numbers of keys that a decode step on a GPU gathers at most: a few launches where groups would take hundreds."""


def attend_spans(
    q: Tensor, kv: LayerKV, first: int, lo: Tensor, hi: Tensor, shift: Tensor, scale: float, *, stop: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from every query head to each of its spans apart.

    Args:
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`.
        kv: the layer.
        first: position of the first query.
        lo: int64 `[B, Hq, T, S]`, first key of each span.
        hi: int64 `[B, Hq, T, S]`, last key of each span; a span with lo > hi is empty.
        shift: int64 `[B, Hq, T, S]`: each span is read as if it stood this many positions nearer to the query.
        scale: what scores are multiplied by.
        stop: where the keys that spans may hold end; None: behind the last query. A rank's rows end elsewhere.

    Returns:
        `(out [B, Hq, T, S, Dv], lse [B, Hq, T, S])`; 0 and -inf for an empty span.
    """
    batch, heads, count, dim = q.shape
    spans = lo.shape[-1]
    kv_heads = kv.kv_heads
    value_dim = kv.values(0, 0).shape[-1]
    group = heads // kv_heads
    at = torch.arange(first, first + count, device=q.device).view(1, 1, -1, 1)
    rows = q.unsqueeze(3).expand(batch, heads, count, spans, dim)
    if kv.rotary is not None:
        rows = kv.rotary(rows, at - shift)
    per_head = (batch, kv_heads, group * count * spans)
    rows = rows.reshape(*per_head, dim)
    lo, hi = lo.reshape(per_head), hi.reshape(per_head)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, kv.keys(0, 0), kv.values(0, 0)))
    if count > 1 and kernel.serves(rows) and not wanted:
        # Decode reads few keys: it must not bring all of them together first. Gradients: `superlinear_gradients.py`.
        stop = first + count if stop is None else stop
        k, v = _keys(kv, 0, stop), kv.values(0, stop)
        out, lse = kernel.span_attention(rows, k, v, lo, hi, scale=scale)
        return out.view(batch, heads, count, spans, value_dim), lse.view(batch, heads, count, spans)
    if q.is_cuda and not wanted:
        most = int((hi - lo).max()) + 1
        if lo.numel() * most * dim <= GATHERED:
            out, lse = gathered(rows, kv, lo, hi, most, scale)
            return out.view(batch, heads, count, spans, value_dim), lse.view(batch, heads, count, spans)
    out = q.new_zeros(*per_head, value_dim)
    lse = q.new_full(per_head, float("-inf"))
    for b in range(batch):
        for h in range(kv_heads):
            order = torch.argsort(torch.where(lo[b, h] <= hi[b, h], lo[b, h], torch.iinfo(torch.int64).max))
            order = order[: int((lo[b, h] <= hi[b, h]).sum())]
            for chosen in _groups(lo[b, h, order], hi[b, h, order], order, GPU_GROUP if q.is_cuda else GROUP):
                begin, end = lo[b, h, chosen], hi[b, h, chosen]
                start, stop = int(begin.min()), int(end.max()) + 1
                keys_at = torch.arange(start, stop, device=q.device)
                k = _keys(kv, start, stop)[b : b + 1, h : h + 1]
                v = kv.values(start, stop)[b : b + 1, h : h + 1]
                mask = (keys_at >= begin.unsqueeze(1)) & (keys_at <= end.unsqueeze(1))
                part, part_lse = partial_attention(rows[b, h, chosen][None, None], k, v, mask, scale=scale)
                out[b, h, chosen], lse[b, h, chosen] = part[0, 0], part_lse[0, 0]
    return out.view(batch, heads, count, spans, value_dim), lse.view(batch, heads, count, spans)


def gathered(
    rows: Tensor, kv: LayerKV, lo: Tensor, hi: Tensor, most: int, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from rows to their spans after gathering what each reads, for itself.

    Args:
        rows: `[B, Hkv, R, D]`, placed where their spans are read from.
        kv: the layer.
        lo: int64 `[B, Hkv, R]`, first key of each span.
        hi: last key of each span; a span with lo > hi is empty.
        most: keys of the longest.
        scale: what scores are multiplied by.

    Returns:
        `(out [B, Hkv, R, Dv], lse [B, Hkv, R])`; 0 and -inf for an empty span.
    """
    value_dim = kv.values(0, 0).shape[-1]
    if most <= 0:
        return rows.new_zeros(*lo.shape, value_dim), rows.new_full(lo.shape, float("-inf"))
    at = lo.unsqueeze(-1) + torch.arange(most, device=lo.device)
    inside = at <= hi.unsqueeze(-1)
    # What is not inside must still be held: the last key always is.
    index = torch.where(inside, at, kv.length - 1)
    k, v = kv.gather(index.flatten(2), rotated=kv.rotary is not None)
    each = lo.numel()
    out, lse = partial_attention(
        rows.reshape(each, 1, 1, -1), k.reshape(each, 1, most, -1), v.reshape(each, 1, most, value_dim),
        inside.view(each, 1, 1, most), scale=scale,
    )  # fmt: skip
    return out.view(*lo.shape, value_dim), lse.view(lo.shape)


def _groups(begin: Tensor, end: Tensor, rows: Tensor, size: int) -> list[Tensor]:
    """Cut rows, sorted by where their spans begin, into groups of at most `size` that lie close together.

    A group also ends where more keys than the longest span has lie unread before the next one: a decode step has so few
    rows that one group would read nearly the whole context. What is read stays below twice the spans' own lengths.
    """
    if rows.numel() < 2:
        return [rows] if rows.numel() else []
    gaps = begin[1:] - torch.cummax(end, 0).values[:-1] > (end - begin).max()
    pieces = torch.tensor_split(rows, (gaps.nonzero().flatten() + 1).cpu())
    return [group for piece in pieces for group in piece.split(size)]


def disjoint(lo: Tensor, hi: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return spans `[..., S]` that cover the same keys without sharing one, in order of their first key.

    Where spans overlap, the one that begins earlier keeps the shared keys; `shift` travels with its span.
    """
    order = torch.argsort(torch.where(lo <= hi, lo, torch.iinfo(torch.int64).max), dim=-1, stable=True)
    lo, hi, shift = lo.gather(-1, order), hi.gather(-1, order), shift.gather(-1, order)
    reached = torch.cummax(torch.where(lo <= hi, hi, torch.full_like(hi, -1)), -1).values
    before = torch.cat([torch.full_like(reached[..., :1], -1), reached[..., :-1]], -1)
    return torch.maximum(lo, before + 1), hi, shift


def _keys(kv: LayerKV, start: int, stop: int) -> Tensor:
    """Keys at their own positions; from the kept rotation of the whole context where the layer has one."""
    return kv.keys_at_own_positions(0, stop)[:, :, start:]


def united(near: Tensor, near_lse: Tensor, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge a window `[B, Hq, T, Dv]` and spans `[B, Hq, T, S, Dv]`, each key in one of them: `(out, lse)`."""
    together = torch.cat([near.unsqueeze(-2), outs], -2).movedim(-2, 0)
    return merge_partials(together, torch.cat([near_lse.unsqueeze(-1), lses], -1).movedim(-1, 0))


def each_with_window(near: Tensor, near_lse: Tensor, outs: Tensor, lses: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Merge each of S spans with the window apart: S times `(out, lse)`."""
    return [
        merge_partials(torch.stack([near, outs[..., j, :]]), torch.stack([near_lse, lses[..., j]]))
        for j in range(outs.shape[-2])
    ]
