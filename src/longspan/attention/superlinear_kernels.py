"""Superlinear attention by kernels, on a GPU: which kernel reads what, at which positions.

Few queries are decode steps: each is a sequence of its own with the same pages. Many are prefill: a search, spans in
order of where they begin, a window, and a merge (`kernels/superlinear`). Where keys have positions, searches read
unrotated keys and attention the layer's rotated copy; beyond the trained length rows are rotated to where their span
is read, one row a span, and then fewer queries are read together.
It does not know the mathematics: `superlinear.py` and the kernels' references do.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention.base import Hints
from longspan.kernels import superlinear as kernels
from longspan.kernels.held import Held
from longspan.kernels.superlinear import Search, Turn
from longspan.kv.base import LayerKV

if TYPE_CHECKING:
    from longspan.attention.superlinear import Superlinear

STEPS = 16
"""Queries up to which each is a decode step: so few rows lie too far apart to share blocks of keys."""
CACHE = 25 << 20
"""Bytes of a GPU's second cache that keys and values can count on: half of an H100's."""
TOGETHER, MOVED = 32768, 8192
"""Queries that are read together, and where each of their spans needs a rotated row of its own."""


def serve(mechanism: Superlinear, q: Tensor, kv: LayerKV, hints: Hints) -> bool:
    """Return whether kernels serve these queries `[B, Hq, T, D]`."""
    if not q.is_cuda or mechanism.summary != "key":
        return False
    k, v = kv.held("k"), kv.held("v")
    if k is None or v is None or not kernels.serves(q, k, v, search_of(mechanism)):
        return False
    tensors = (q, k.rows, v.rows, hints.routing_query)
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def search_of(mechanism: Superlinear) -> Search:
    """Return the options that kernels need."""
    return Search(
        mechanism.whole_window,
        mechanism.spans,
        mechanism.backward,
        mechanism.forward,
        mechanism.power,
        mechanism.span_power,
        mechanism.gate,
        mechanism.sinks,
        mechanism.share,
    )


def attend(mechanism: Superlinear, q: Tensor, kv: LayerKV, scale: float, hints: Hints) -> Tensor:
    """Attend as `Mechanism.attend` does; `serve` was asked."""
    first, count = kv.length - q.shape[2], q.shape[2]
    search = search_of(mechanism)
    routing = q if hints.routing_query is None else hints.routing_query
    searched, v = (kv.held(what, whole=count > STEPS) for what in ("k", "v"))
    assert searched is not None and v is not None, "serve() was not asked"
    k, turn = searched, None
    if kv.rotary is not None:
        k = Held(kv.keys_at_own_positions(0, kv.length))
        trained = kv.rotary.trained_length
        turn = Turn(kv.rotary.turns(q.device), 2**31 - 1 if trained is None else trained)
    # Queries are kept in the keys' type: kernels multiply both as they are.
    q, routing = q.to(k.rows.dtype), routing.to(k.rows.dtype)
    if count <= STEPS:
        return _steps(q, routing, k, v, searched, search, turn, first, scale)
    beyond = count if turn is None else max(0, min(count, turn.trained - first))
    edges = sorted({*range(0, beyond, TOGETHER), *range(beyond, count, MOVED), count})
    parts = []
    for start, stop in itertools.pairwise(edges):
        moved = turn is not None and start >= beyond
        chunk, search_by = q[:, :, start:stop], routing[:, :, start:stop]
        parts.append(_chunk(chunk, search_by, kv, k, v, searched, search, first + start, scale, moved))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _steps(
    q: Tensor, routing: Tensor, k: Held, v: Held, searched: Held, search: Search, turn: Turn | None, first: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attend from few queries, each as a decode step of its own."""
    batch, heads, count, dim = q.shape
    lengths = torch.arange(first + 1, first + count + 1, device=q.device).repeat(batch)
    rows, search_by = (x.transpose(1, 2).reshape(batch * count, heads, dim) for x in (q, routing))
    k, v, searched = (held.repeated(count) for held in (k, v, searched))
    out = kernels.decode(
        rows, k, v, lengths, search, scale=scale, routing_query=search_by, search_keys=searched, turn=turn
    )
    return out.view(batch, count, heads, -1).transpose(1, 2)


def _chunk(
    q: Tensor, routing: Tensor, kv: LayerKV, k: Held, v: Held, searched: Held, search: Search, first: int, scale: float,
    moved: bool,
) -> Tensor:  # fmt: skip
    """Attend from many queries.

    Args:
        q: `[B, Hq, T, D]`, unrotated, of the tokens from `first` on.
        routing: unrotated queries that search.
        kv: the layer.
        k: its keys, at their own positions.
        v: its values.
        searched: its unrotated keys.
        search: what is read.
        first: the first query's token.
        scale: what scores are multiplied by.
        moved: whether spans are read as if they stood directly before the window.
    """
    from longspan.kernels.span_attention.launch import span_attention
    from longspan.kernels.superlinear.triton_prefill import merge, search_spans

    batch, heads, count, dim = q.shape
    at = torch.arange(first, first + count, device=q.device)
    rotated = kv.queries_at(q, at)
    near, near_lse = _window(rotated, kv, k, first, search.window, scale)
    near, near_lse = _with_sinks(near, near_lse, q, rotated, kv, k, v, search, first, scale, moved)
    if not search.spans or not search.steps(first + count, q.device).numel():
        return near
    scores, lo, hi, order = search_spans(routing, searched, first, search)
    rows = rotated
    if moved:
        each = (hi + search.window).view(batch, heads, count, search.spans)
        rows = kv.queries_at(q.unsqueeze(3).expand(-1, -1, -1, search.spans, -1), each)
    per_head = (batch, k.heads, heads // k.heads * count * search.spans)
    # Spans of 132 tiles of 128 rows that run at the same time: once they outgrow the cache, tiles must go side by side.
    apart = 128 * 132 * (first + count) / per_head[2] * (k.dim + v.dim) * k.rows.element_size()
    beat = search.longest(first + 1) * 15 // 16 if apart > CACHE else 0
    outs, lses = span_attention(
        rows.reshape(batch, k.heads, -1, dim), k, v, lo.view(per_head), hi.view(per_head), scale=scale, order=order,
        out_dtype=q.dtype, beat=beat,
    )  # fmt: skip
    return merge(near, near_lse, outs, lses, scores, joint=search.gate == "joint")


def _window(rotated: Tensor, kv: LayerKV, k: Held, first: int, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the window: only the keys that it reaches are brought together."""
    from longspan.kernels.window_attention.triton_kernels import window_attention

    start, stop = max(0, first - window + 1), first + rotated.shape[2]
    # Rotated keys are held as a tensor already: asked for again, a layer without a copy would rotate its whole past.
    keys = kv.keys(start, stop) if kv.rotary is None else k.rows[:, :, start:stop]
    return window_attention(rotated, keys, kv.values(start, stop), window=window, scale=scale, out_dtype=rotated.dtype)


def _with_sinks(
    near: Tensor, near_lse: Tensor, q: Tensor, rotated: Tensor, kv: LayerKV, k: Held, v: Held, search: Search,
    first: int, scale: float, moved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add the sinks that the window does not hold."""
    from longspan.kernels.span_attention.launch import span_attention
    from longspan.kernels.superlinear.triton_prefill import merge

    batch, heads, count, dim = q.shape
    if not search.sinks or first + count <= search.window:
        return near, near_lse
    at = torch.arange(first, first + count, device=q.device)
    last = (at - search.window).clamp(max=search.sinks - 1)
    rows = kv.queries_at(q, last + search.window) if moved else rotated
    per_head = (batch, k.heads, heads // k.heads * count)
    hi = last.to(torch.int32).expand(batch, heads, -1).reshape(per_head)
    lo = torch.where(hi < 0, 1, 0).to(torch.int32)
    out, lse = span_attention(rows.reshape(*per_head, dim), k, v, lo, hi.clamp(min=0), scale=scale, out_dtype=q.dtype)
    lse = lse.view(near_lse.shape)
    return merge(near, near_lse, out, lse, lse.unsqueeze(-1), joint=True), torch.logaddexp(near_lse, lse)
