"""Gradients of superlinear attention by its kernels: what is kept of the forward pass, and what is computed again.

A query's keys lie in columns that share none: the window, the sinks, each span. Column c has an output o_c and a
log-sum-exp l_c, and under either gate the output is `sum_c f_c o_c` with numbers f_c that depend on these and on the
search scores alone (`_Gate`). Weights of keys are then `f_c exp(scale q k - l_c) = exp(scale q k - L_c)` with
`L_c = l_c - log f_c`, and each column's gradients have one form (`kernels/span_attention/backward.py`), with

- `joint`: `delta = do . out`, the same for all;
- `routed`, `out = sum_j w_j O_j`, w the softmax of the search scores s: with `D_j = do . O_j`, span j has
  `delta = D_j`; what is near has `delta = sum_j u_j D_j`, u the softmax of `log w_j - L_j`, since it is a part of every
  O_j; and `ds_j = w_j (D_j - sum_i w_i D_i)`, which the routing query and the anchors' keys share.

Which spans were chosen is not differentiated; under `joint` the search has no gradient at all. Kept are the inputs, the
output, the columns' log-sum-exp and the spans; weights, and the columns' outputs, are computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.attention.base import Hints
from longspan.attention.spans import disjoint
from longspan.kernels.anchor_scores import anchor_scores_backward
from longspan.kernels.span_attention import row_products, span_attention, span_attention_backward, span_products
from longspan.kernels.span_attention import serves as kernels_serve
from longspan.kernels.span_attention.order import SpanOrder, bands
from longspan.kernels.window_attention import window_attention
from longspan.kv.base import LayerKV

if TYPE_CHECKING:
    from longspan.attention.superlinear import Superlinear


def serves(mechanism: Superlinear, q: Tensor, kv: LayerKV, hints: Hints) -> bool:
    """Return whether gradients are wanted, and of a kind that the kernels have.

    Not so where spans are read nearer than they stand (beyond the trained length), or weighed by scores of pages'
    bounds.
    """
    if not torch.is_grad_enabled() or not kernels_serve(q) or q.dtype == torch.float64:
        return False
    tensors = (q, hints.routing_query, kv.keys(0, kv.length), kv.values(0, kv.length))
    if not any(x is not None and x.requires_grad for x in tensors):
        return False
    rotary = kv.rotary
    within = rotary is None or rotary.trained_length is None or kv.length <= rotary.trained_length
    return within and (mechanism.gate == "joint" or mechanism.summary == "key")


def attend(mechanism: Superlinear, q: Tensor, kv: LayerKV, scale: float | None, hints: Hints) -> Tensor:
    """Attend as `Mechanism.attend` does, so that gradients reach q, the keys and values, and the routing query."""
    first = kv.length - q.shape[2]
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    routing = q if hints.routing_query is None else hints.routing_query
    with torch.no_grad():
        found = _search(mechanism, routing, kv, first)
    columns = _columns(mechanism, q, kv.keys(0, 0).shape[1], first, found)
    rotated = kv.rotary is not None
    searched = kv.keys(0, kv.length) if rotated else None
    at = torch.arange(first, kv.length, device=q.device)
    apart = rotated or hints.routing_query is not None
    out: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        kv.queries_at(q, at), kv.keys_at_own_positions(0, kv.length), kv.values(0, kv.length),
        routing if apart else None, searched, columns, scale,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Columns:
    """What every query reads: integers `[B, Hq, T, C]`, first and last key of each column, the S spans last."""

    lo: Tensor
    hi: Tensor
    scores: Tensor | None
    """Float32 `[B, Hq, T, S]`, search scores, -inf where there is no span; None: one softmax over everything."""
    anchors: Tensor | None
    """Integers `[B, Hq, T, S]`, with the scores."""
    window: int
    bands: int
    """Into how many bands kernels best cut the queries (`kernels/span_attention/order.py`)."""

    @property
    def near(self) -> int:
        """How many columns are near: the window, and perhaps the sinks."""
        return self.lo.shape[-1] - (0 if self.scores is None else self.scores.shape[-1])


def _search(
    mechanism: Superlinear, routing: Tensor, kv: LayerKV, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Find scores, spans and anchors, `[B, Hq, T, S]`, a tile of queries after the other; None: there are none."""
    found = []
    spans = 0
    for start in range(0, routing.shape[2], mechanism.gpu_tile):
        tile = routing[:, :, start : start + mechanism.gpu_tile].to(torch.promote_types(routing.dtype, torch.float32))
        part = mechanism.find(tile, kv, first + start)
        found.append((tile.shape, part))
        spans = max(spans, 0 if part is None else part[0].shape[-1])
    if not spans:
        return None
    fills = (float("-inf"), 0, -1, 0)
    columns: list[list[Tensor]] = [[], [], [], []]
    for shape, part in found:
        for column, fill, i in zip(columns, fills, range(4), strict=True):
            kind = torch.int64 if i else torch.promote_types(routing.dtype, torch.float32)
            whole = torch.full((*shape[:3], spans), fill, dtype=kind, device=routing.device)
            if part is not None:
                whole[..., : part[i].shape[-1]] = part[i]
            column.append(whole)
    scores, lo, hi, anchors = (torch.cat(column, 2) for column in columns)
    return scores, lo, hi, anchors


def _columns(
    mechanism: Superlinear,
    q: Tensor,
    kv_heads: int,
    first: int,
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> _Columns:
    """Put window, sinks and spans beside each other."""
    window, count = mechanism.whole_window, q.shape[2]
    at = torch.arange(first, first + count, device=q.device).view(1, 1, -1, 1).expand(*q.shape[:3], 1)
    lo, hi = [(at - window + 1).clamp(min=0)], [at]
    if mechanism.sinks and first + count > window:
        lo.append(torch.zeros_like(at))
        hi.append((at - window).clamp(max=mechanism.sinks - 1))
    scores = anchors = None
    if found is not None:
        scores, span_lo, span_hi, anchors = found
        span_lo = span_lo.clamp(min=mechanism.sinks)  # sinks are read already
        if mechanism.gate == "joint":
            span_lo, span_hi, _ = disjoint(span_lo, span_hi, span_lo)
            scores = anchors = None
        lo.append(span_lo)
        hi.append(span_hi)
    lengths = [
        math.ceil(mechanism.backward * reach) + math.ceil(mechanism.forward * reach)
        for reach in (float(n) ** mechanism.span_power for n in (first + count, first + 1))
    ]
    cut = bands(first, count, q.shape[1] // kv_heads, *lengths)
    return _Columns(torch.cat(lo, -1).int(), torch.cat(hi, -1).int(), scores, anchors, window, cut)


@dataclass(frozen=True)
class _Gate:
    """What the outputs of columns are multiplied by, from their log-sum-exp `[B, Hq, T, C]`."""

    parts: Tensor
    """`[B, Hq, T, C]`: the numbers f of the module."""
    weights: Tensor | None = None
    """`[B, Hq, T, S]`: w of the module; None: one softmax over everything."""
    totals: Tensor | None = None
    """`[B, Hq, T, S]`: log-sum-exp of each span and what is near."""

    @classmethod
    def of(cls, lses: Tensor, scores: Tensor | None) -> _Gate:
        """Return the gate; a query always reads its own key, so that something is always near."""
        if scores is None:
            return cls(torch.softmax(lses, -1))
        spans = scores.shape[-1]
        near = torch.logsumexp(lses[..., :-spans], -1, keepdim=True)
        # Without a span the first one, which is empty, stands for what is near.
        none = (scores == float("-inf")).all(-1)
        scores = torch.cat([scores[..., :1].masked_fill(none.unsqueeze(-1), 0.0), scores[..., 1:]], -1)
        weights = torch.softmax(scores, -1)
        totals = torch.logaddexp(near, lses[..., -spans:])
        share = (weights * torch.exp(near - totals)).sum(-1, keepdim=True)
        parts = torch.cat(
            [share * torch.exp(lses[..., :-spans] - near), weights * torch.exp(lses[..., -spans:] - totals)], -1
        )
        return cls(parts, weights, totals)

    def products(self, each: Tensor, near_lses: Tensor) -> tuple[Tensor, Tensor]:
        """Return delta `[B, Hq, T, C]` and the scores' gradients `[B, Hq, T, S]` (routed).

        Args:
            each: `do . o_c` of every column, `[B, Hq, T, C]`.
            near_lses: log-sum-exp of the columns that are near.
        """
        assert self.weights is not None and self.totals is not None
        spans, count = self.weights.shape[-1], near_lses.shape[-1]
        near = torch.logsumexp(near_lses, -1, keepdim=True)
        near_product = (torch.softmax(near_lses, -1) * each[..., :count]).sum(-1, keepdim=True)
        apart = 1.0 - torch.exp(near - self.totals)
        products = near_product + apart * (each[..., -spans:] - near_product)
        shares = torch.softmax(torch.log(self.weights) - self.totals, -1)
        delta = torch.cat([(shares * products).sum(-1, keepdim=True).expand(*each.shape[:-1], count), products], -1)
        return delta, self.weights * (products - (self.weights * products).sum(-1, keepdim=True))


class _Attend(torch.autograd.Function):
    """Attention to columns, given which they are."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routing: Tensor | None,
        searched: Tensor | None,
        columns: _Columns,
        scale: float,
    ) -> Tensor:
        """Return `[B, Hq, T, Dv]` in q's type; `routing` and `searched`: where they are not q and k themselves."""
        q, k, v = q.detach(), k.detach(), v.detach()
        near, near_lse = window_attention(q, k, v, window=columns.window, scale=scale)
        lses, outs = [near_lse.unsqueeze(-1)], [near]
        for j in range(1, columns.lo.shape[-1]):
            out, lse = _attend_column(q, k, v, columns.lo[..., j], columns.hi[..., j], scale)
            outs.append(out)
            lses.append(lse.unsqueeze(-1))
        lse = torch.cat(lses, -1)
        gate = _Gate.of(lse, columns.scores)
        out = torch.zeros_like(near)
        for j, one in enumerate(outs):
            out += gate.parts[..., j : j + 1] * one
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, routing, searched, out, lse)
        ctx.columns, ctx.scale = columns, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, the routing query and the searched keys."""
        q, k, v, routing, searched, out, lse = ctx.saved_tensors
        columns: _Columns = ctx.columns
        gate = _Gate.of(lse, columns.scores)
        d_scores = order = None
        if kernels_serve(q):
            order = SpanOrder.of(columns.lo, columns.hi, k.shape[1], k.shape[2], columns.bands)
        if columns.scores is None:
            delta = row_products(do, out).unsqueeze(-1).expand_as(lse)
        else:
            each = span_products(q, k, v, columns.lo, columns.hi, lse, do, scale=ctx.scale, order=order)
            delta, d_scores = gate.products(each, lse[..., : columns.near])
        # A column that weighs nothing: infinity.
        relative = torch.where(gate.parts > 0, lse - torch.log(gate.parts), float("inf"))
        dq, dk, dv = span_attention_backward(
            q, k, v, columns.lo, columns.hi, relative, delta, do, scale=ctx.scale, order=order
        )
        d_routing = d_searched = None
        if d_scores is not None and columns.anchors is not None:
            found = k if searched is None else searched
            into = dk if searched is None else torch.zeros(searched.shape, dtype=searched.dtype, device=k.device)
            d_routing = anchor_scores_backward(
                q if routing is None else routing, found, columns.anchors, d_scores, into
            )
            d_searched = None if searched is None else into
            if routing is None:
                dq, d_routing = dq + d_routing.to(dq.dtype), None
        grads = ((dq, q), (dk, k), (dv, v), (d_routing, routing), (d_searched, searched))
        return (*(None if grad is None else grad.to(of.dtype) for grad, of in grads), None, None)


def _attend_column(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to one span of every query `[B, Hq, T]`; returns out and log-sum-exp of that shape."""
    rows = (q.shape[0], k.shape[1], -1)
    out, lse = span_attention(
        q.reshape(*rows, q.shape[-1]), k, v, lo.reshape(rows).long(), hi.reshape(rows).long(), scale=scale
    )
    return out.view(*q.shape[:3], -1), lse.view(q.shape[:3])
