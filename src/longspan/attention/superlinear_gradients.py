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
output, the columns and their log-sum-exp; weights are computed again. Under `routed` the columns' outputs are kept as
well, in the queries' type, for `do . o_c`: until the first backward pass, and computed again in any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.attention.base import Hints
from longspan.attention.superlinear_columns import Columns
from longspan.kernels.anchor_scores import anchor_scores_backward
from longspan.kernels.span_attention import row_products, span_attention, span_attention_backward, span_products
from longspan.kernels.span_attention import serves as kernels_serve
from longspan.kernels.span_attention.order import SpanOrder
from longspan.kernels.window_attention import window_attention
from longspan.kv.base import LayerKV

if TYPE_CHECKING:
    from longspan.attention.superlinear import Superlinear


def serves(mechanism: Superlinear, q: Tensor, kv: LayerKV, hints: Hints) -> bool:
    """Return whether gradients are wanted, and of a kind that the kernels have.

    Not so where spans are read nearer than they stand (beyond the trained length), or weighed by scores of pages'
    bounds or of several heads.
    """
    if not torch.is_grad_enabled() or not kernels_serve(q):
        return False
    k, v = kv.keys(0, 0), kv.values(0, 0)
    if k.dtype != v.dtype or k.dtype == torch.float64 or v.shape[-1] > 256:
        return False
    tensors = (q, hints.routing_query, kv.keys(0, kv.length), kv.values(0, kv.length))
    if not any(x is not None and x.requires_grad for x in tensors):
        return False
    rotary = kv.rotary
    within = rotary is None or rotary.trained_length is None or kv.length <= rotary.trained_length
    return within and (mechanism.gate == "joint" or (mechanism.summary == "key" and mechanism.share == "head"))


def attend(mechanism: Superlinear, q: Tensor, kv: LayerKV, scale: float | None, hints: Hints) -> Tensor:
    """Attend as `Mechanism.attend` does, so that gradients reach q, the keys and values, and the routing query."""
    routing = q if hints.routing_query is None else hints.routing_query
    with torch.no_grad():
        columns = Columns.of(mechanism, routing, kv)
    rotated = kv.rotary is not None
    at = torch.arange(kv.length - q.shape[2], kv.length, device=q.device)
    out: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        kv.queries_at(q, at),
        kv.keys_at_own_positions(0, kv.length),
        kv.values(0, kv.length),
        routing if rotated or hints.routing_query is not None else None,
        kv.keys(0, kv.length) if rotated else None,
        columns,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
    )
    return out


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
        columns: Columns,
        scale: float,
    ) -> Tensor:
        """Return `[B, Hq, T, Dv]` in q's type; `routing` and `searched`: where they are not q and k themselves."""
        outs, lses = _attend_columns(q.detach(), k.detach(), v.detach(), columns, scale)
        lse = torch.cat(lses, -1)
        out = _merged(outs, lses, columns).to(q.dtype)
        ctx.save_for_backward(q, k, v, routing, searched, out, lse)
        ctx.columns, ctx.scale = columns, scale
        ctx.outs = None if columns.scores is None else outs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k, v, the routing query and the searched keys."""
        q, k, v, routing, searched, out, lse = ctx.saved_tensors
        columns: Columns = ctx.columns
        lo, hi, scale = columns.lo, columns.hi, ctx.scale
        order = SpanOrder.of(lo, hi, k.shape[1], k.shape[2], columns.bands) if kernels_serve(q) else None
        gate = _Gate.of(lse, columns.scores)
        d_scores = None
        if columns.scores is None:
            delta = row_products(do, out).unsqueeze(-1).expand_as(lse)
        else:
            if ctx.outs is not None:
                each = torch.cat([row_products(do, one) for one in ctx.outs], -1)
                ctx.outs = None  # as large as four outputs: gone before dq is made
            else:
                each = span_products(q, k, v, lo, hi, lse, do, scale=scale, order=order)
            delta, d_scores = gate.products(each, lse[..., : columns.near])
        # A column that weighs nothing: infinity.
        relative = torch.where(gate.parts > 0, lse - torch.log(gate.parts), float("inf"))
        dq, dk, dv = span_attention_backward(q, k, v, lo, hi, relative, delta, do, scale=scale, order=order)
        d_routing = d_searched = None
        if d_scores is not None and columns.anchors is not None:
            found = k if searched is None else searched
            into = dk if searched is None else torch.zeros(searched.shape, dtype=searched.dtype, device=k.device)
            by = q if routing is None else routing
            d_routing = anchor_scores_backward(by, found, columns.anchors, d_scores, into)
            d_searched = None if searched is None else into
            if routing is None:
                dq, d_routing = dq + d_routing.to(dq.dtype), None
        grads = ((dq, q), (dk, k), (dv, v), (d_routing, routing), (d_searched, searched))
        return (*(None if grad is None else grad.to(of.dtype) for grad, of in grads), None, None)


def _attend_columns(
    q: Tensor, k: Tensor, v: Tensor, columns: Columns, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Attend to the window, to the sinks if there are any, and to the spans, each by itself.

    Returns:
        `(outs, lses)`: of each `[B, Hq, T, c, Dv]` and `[B, Hq, T, c]`, where c is 1, or the number of spans. By
        kernels outs are in q's type, and in the computing type elsewhere.
    """
    kind = q.dtype if kernels_serve(q) else torch.promote_types(q.dtype, torch.float32)
    out, lse = window_attention(q, k, v, window=columns.window, scale=scale, out_dtype=kind)
    outs, lses = [out.unsqueeze(-2)], [lse.unsqueeze(-1)]
    for some, order in ((slice(1, columns.near), None), (slice(columns.near, None), columns.order)):
        lo, hi = columns.lo[..., some], columns.hi[..., some]
        if not lo.shape[-1]:
            continue
        per_head = (q.shape[0], k.shape[1], -1)
        out, lse = span_attention(
            q.reshape(*per_head, q.shape[-1]),
            k,
            v,
            lo.reshape(per_head),
            hi.reshape(per_head),
            scale=scale,
            order=order,
            out_dtype=kind,
        )
        outs.append(out.view(*lo.shape, -1))
        lses.append(lse.view(lo.shape))
    return outs, lses


def _merged(outs: list[Tensor], lses: list[Tensor], columns: Columns) -> Tensor:
    """Return the output `[B, Hq, T, Dv]` from those of the columns; it may lie where the window's lay."""
    if not kernels_serve(outs[0]):
        parts = _Gate.of(torch.cat(lses, -1), columns.scores).parts
        return (parts.unsqueeze(-1) * torch.cat(outs, -2)).sum(-2)
    from longspan.kernels.superlinear.triton_prefill import merge

    near, near_lse = outs[0].squeeze(-2), lses[0].squeeze(-1)
    if columns.scores is not None:
        near = near.clone()  # a merge takes its place, and the columns' outputs are kept
    if columns.near > 1:
        near = merge(near, near_lse, outs[1], lses[1], lses[1], joint=True)
        near_lse = torch.logaddexp(near_lse, lses[1].squeeze(-1))
    if len(outs) == columns.near:
        return near
    scores = lses[-1] if columns.scores is None else columns.scores
    return merge(near, near_lse, outs[-1], lses[-1], scores, joint=columns.scores is None)
