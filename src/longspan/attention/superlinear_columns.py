"""What every query of superlinear attention reads, as columns of spans that share no key: for its gradients.

Columns are the window, the sinks where there are any older than it, and the spans that the search chose. It does not
know what is computed with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.attention import superlinear_kernels
from longspan.attention.spans import disjoint
from longspan.kernels import superlinear as kernels
from longspan.kernels.span_attention.order import bands
from longspan.kv.base import LayerKV

if TYPE_CHECKING:
    from longspan.attention.superlinear import Superlinear


@dataclass(frozen=True)
class Columns:
    """First and last key of each column, for every query.

    Attributes:
        lo: int32 `[B, Hq, T, C]`; near columns first, then S spans.
        hi: int32 `[B, Hq, T, C]`; lo > hi: the column is empty.
        near: how many columns are near: the window, and perhaps the sinks.
        window: keys that each query sees of its own past.
        bands: into how many bands kernels best cut the queries (`kernels/span_attention/order.py`).
        scores: float32 `[B, Hq, T, S]`, search scores, -inf where there is no span; None: all columns are one softmax.
        anchors: integers `[B, Hq, T, S]`, with the scores; 0 where there is no span.
        order: the rows of the spans as `kernels/span_attention` takes them; None: not known.
    """

    lo: Tensor
    hi: Tensor
    near: int
    window: int
    bands: int
    scores: Tensor | None = None
    anchors: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, mechanism: Superlinear, routing: Tensor, kv: LayerKV) -> Columns:
        """Search for the last T positions by routing queries `[B, Hq, T, D]`, unrotated."""
        window, count, heads = mechanism.whole_window, routing.shape[2], routing.shape[1]
        first = kv.length - count
        at = torch.arange(first, kv.length, device=routing.device, dtype=torch.int32).view(1, 1, -1, 1)
        at = at.expand(*routing.shape[:3], 1)
        lo, hi = [(at - window + 1).clamp(min=0)], [at]
        if mechanism.sinks and kv.length > window:
            lo.append(torch.zeros_like(at))
            hi.append((at - window).clamp(max=mechanism.sinks - 1))
        near = len(lo)
        found = _found(mechanism, routing, kv, first)
        scores = anchors = order = None
        if found is not None:
            scores, span_lo, span_hi, anchors, order = found
            lo.append(span_lo)
            hi.append(span_hi)
            if mechanism.gate == "joint":
                scores = anchors = None
        lengths = [
            math.ceil(mechanism.backward * reach) + math.ceil(mechanism.forward * reach)
            for reach in (float(n) ** mechanism.span_power for n in (kv.length, first + 1))
        ]
        cut = bands(first, count, heads // kv.kv_heads, *lengths)
        return cls(torch.cat(lo, -1), torch.cat(hi, -1), near, window, cut, scores, anchors, order)


_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _found(mechanism: Superlinear, routing: Tensor, kv: LayerKV, first: int) -> _Found | None:
    """Return scores, first and last keys, anchors, and the rows' order; None where no query has an anchor.

    Sinks are read already, and with `gate=joint` no key is in two spans.
    """
    k, v, search = kv.held("k"), kv.held("v"), superlinear_kernels.search_of(mechanism)
    if mechanism.summary == "key" and k is not None and v is not None and kernels.serves(routing, k, v, search):
        if not search.spans or not search.steps(kv.length, routing.device).numel():
            return None
        from longspan.kernels.superlinear.triton_prefill import search_spans

        anchors = torch.empty(*routing.shape[:3], search.spans, dtype=torch.int32, device=routing.device)
        scores, lo, hi, order = search_spans(routing.to(k.rows.dtype), k, first, search, anchors)
        return scores.view(anchors.shape), lo.view(anchors.shape), hi.view(anchors.shape), anchors, order
    found = _plainly_found(mechanism, routing, kv, first)
    if found is None:
        return None
    scores, lo, hi, anchors = found
    lo = lo.clamp(min=mechanism.sinks)
    if mechanism.gate == "joint":
        lo, hi, anchors = disjoint(lo, hi, anchors)
    return scores, lo.int(), hi.int(), anchors, None


def _plainly_found(
    mechanism: Superlinear, routing: Tensor, kv: LayerKV, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Search a tile of queries after the other; where a tile has fewer anchors than spans, spans are empty."""
    kind = torch.promote_types(routing.dtype, torch.float32)
    tiles = [
        (tile, mechanism.find(tile.to(kind), kv, first + start))
        for start, tile in zip(
            range(0, routing.shape[2], mechanism.gpu_tile), routing.split(mechanism.gpu_tile, 2), strict=True
        )
    ]
    spans = max((found[0].shape[-1] for _, found in tiles if found is not None), default=0)
    if not spans:
        return None
    whole = []
    for i, nothing in enumerate((float("-inf"), 0, -1, 0)):
        parts = []
        for tile, found in tiles:
            part = torch.full((*tile.shape[:3], spans), nothing, dtype=torch.int64 if i else kind, device=tile.device)
            if found is not None:
                part[..., : found[i].shape[-1]] = found[i]
            parts.append(part)
        whole.append(torch.cat(parts, 2))
    scores, lo, hi, anchors = whole
    return scores, lo, hi, anchors
