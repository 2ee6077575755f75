"""Superlinear attention: a window, and a few spans found by a search over O(sqrt(n)) anchors.

Superlinear Multi-Step Attention (arXiv 2601.18401). A query at t, with n = t + 1:

- window: the keys `t - w + 1 .. t`;
- anchors: `a_i = t - floor(i^(1/power)) + 1` for every integer i >= 1 with `0 <= a_i <= t - w`. `window` is rounded up
  to the next `floor(j^(1/power)) - 1`, so that the newest anchor touches it and no key falls between;
- search: `s_i = q_s . k[a_i]`, unscaled, float32; the `spans` best a query head (ties: the newer anchor), where
  `q_s` is the routing query if the model has one, else q;
- the span of anchor a: `max(0, a - ceil(backward n^span_power)) .. min(a + ceil(forward n^span_power), t - w)`.

`gate="routed"` (the paper, for models trained so): `O_j = softmax(q K / sqrt(D))` over span j and the window jointly,
`out = sum_j softmax_j(s) O_j`. `gate="joint"` (ordinary checkpoints): one softmax over the union of window and spans,
each key counted once; it tends to dense as spans grow. `summary="bounds"` scores an anchor by the greatest score that
any key of its page of 64 could have (as Quest, arXiv 2406.10774, equation 2), for checkpoints not trained for anchors.

`share="group"`: the query heads of a KV head read the same spans, those with the greatest sums of their scores (and
these sums are what `routed` weighs by). A decode step then reads a span once for the whole group.

`sinks` first keys of the context are read by every query, as if they belonged to its window (0: the paper). Ordinary
checkpoints put what attention they don't need on these keys, and break without them.

With backward >= 2 and power = 0.5 every past key lies in some candidate span. The paper's setting: power 0.55,
span_power 0.55, window 2032.

Positions: searched by unrotated keys. Up to the trained length everything is read at its true position; beyond it,
every span as if it stood directly before the window, so that no distance exceeds `window + span`.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention import superlinear_gradients, superlinear_kernels, superlinear_sharded
from longspan.attention.base import Cost, Hints, Mechanism, Shape, at_least, one_of
from longspan.attention.sharded import Parts
from longspan.attention.spans import attend_spans, disjoint, each_with_window, united
from longspan.attention.window import attend_window
from longspan.distributed.group import Group
from longspan.distributed.shards import ShardRows
from longspan.errors import UsageError
from longspan.kernels import superlinear as kernels
from longspan.kernels.held import Held
from longspan.kernels.superlinear import Turn, offsets
from longspan.kv.base import PAGE, LayerKV


@dataclass(frozen=True)
class Superlinear(Mechanism):
    """Reads a window and the spans around the best of O(sqrt(n)) anchors."""

    window: int = 2024
    """Newest keys that a query sees; rounded up (see the module)."""
    spans: int = 3
    """Spans a query head reads."""
    backward: float = 3.0
    """Length of a span before its anchor, in units of n^span_power."""
    forward: float = 1.0
    """Length of a span after its anchor, in units of n^span_power."""
    power: float = 0.5
    """The number of anchors grows as n^power."""
    span_power: float = 0.5
    """The length of a span grows as n^span_power."""
    gate: str = "joint"
    """`joint`: one softmax over window and spans; `routed`: spans weighed by their search scores."""
    summary: str = "key"
    """What stands for an anchor in the search: its own `key`, or its page's `bounds`."""
    sinks: int = 0
    """First keys of the context that every query reads beside its window; an ordinary checkpoint wants a few."""
    share: str = "head"
    """Who chooses spans: each query `head`, or the `group` of heads of a KV head, by the sum of their scores."""

    name: ClassVar[str] = "superlinear"
    about: ClassVar[str] = "a window and the spans around the best of sqrt(n) anchors"
    source: ClassVar[str] = "arXiv 2601.18401"
    decode_order: ClassVar[str] = "n^0.5"
    sharded: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    tile: ClassVar[int] = 64

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        at_least("window", self.window, 1)
        at_least("spans", self.spans, 0)
        at_least("backward", self.backward, 0)
        at_least("forward", self.forward, 0)
        at_least("sinks", self.sinks, 0)
        for name in ("power", "span_power"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} must lie above 0 and be at most 1")
        one_of("gate", self.gate, ("joint", "routed"))
        one_of("summary", self.summary, ("key", "bounds"))
        one_of("share", self.share, ("head", "group"))
        if self.summary == "bounds" and self.window < PAGE:
            raise UsageError(f"summary=bounds needs window of at least a page ({PAGE}), not {self.window}")

    @property
    def first_anchor(self) -> int:
        """The least i whose anchor lies outside the window."""
        return bisect.bisect_left(offsets(self.power, self.window + 1), self.window + 1) + 1

    @property
    def whole_window(self) -> int:
        """The window after rounding up, in tokens."""
        return offsets(self.power, self.window + 1)[self.first_anchor - 1] - 1

    def anchors(self, t: int) -> list[int]:
        """Return the anchors of a query at t, newest first."""
        table = offsets(self.power, t + 1)
        return [t - off + 1 for off in table[self.first_anchor - 1 : bisect.bisect_right(table, t + 1)]]

    def span(self, t: int, anchor: int) -> tuple[int, int]:
        """Return the first and last key of the span of an anchor, for a query at t."""
        reach = float(t + 1) ** self.span_power
        return (
            max(0, anchor - math.ceil(self.backward * reach)),
            min(anchor + math.ceil(self.forward * reach), t - self.whole_window),
        )

    def attend(self, q: Tensor, kv: LayerKV, *, scale: float | None = None, hints: Hints | None = None) -> Tensor:
        """See `Mechanism.attend`; kernels attend, and compute gradients, where they serve."""
        hints = hints or Hints()
        if superlinear_gradients.serves(self, q, kv, hints):
            return superlinear_gradients.attend(self, q, kv, scale, hints)
        if superlinear_kernels.serve(self, q, kv, hints):
            scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
            return superlinear_kernels.attend(self, q, kv, scale, hints).to(q.dtype)
        return super().attend(q, kv, scale=scale, hints=hints)

    @property
    def steps(self) -> bool:
        """See `Mechanism.steps`."""
        return self.summary == "key"

    def step(
        self, q: Tensor, k: Held, v: Held, lengths: Tensor, *, scale: float, searched: Held, turn: Turn | None
    ) -> Tensor:
        """See `Mechanism.step`."""
        search = superlinear_kernels.search_of(self)
        return kernels.decode(q, k, v, lengths, search, scale=scale, search_keys=searched, turn=turn)

    def reads_all_of(self, n: int) -> bool:
        """See `Mechanism.reads_all_of`."""
        return n <= self.window

    def attend_tile(self, q: Tensor, kv: LayerKV, first: int, scale: float, hints: Hints) -> Tensor:
        """See `Mechanism.attend_tile`."""
        near, near_lse = self._near(q, kv, first, scale)
        routing = q if hints.routing_query is None else hints.routing_query.to(q.dtype)
        found = self.search(routing, kv, first)
        if found is None:
            return near
        scores, lo, hi = found
        valid = lo <= hi
        shift = self.shifts(kv, first, q.shape[2], hi)
        lo = lo.clamp(min=self.sinks)  # sinks are read already
        if self.gate == "joint":
            lo, hi, shift = disjoint(lo, hi, shift)
        outs, lses = attend_spans(q, kv, first, lo, hi, shift, scale)
        if self.gate == "joint":
            return united(near, near_lse, outs, lses)[0]
        each = [out for out, _ in each_with_window(near, near_lse, outs, lses)]
        some = valid.any(-1, keepdim=True)
        weights = torch.softmax(torch.where(some, scores, torch.zeros_like(scores)), -1)
        routed = (weights.unsqueeze(-1) * torch.stack(each, -2)).sum(-2)
        return torch.where(some, routed, near)

    def attend_shard(self, q: Tensor, rows: ShardRows, group: Group, first: int, scale: float, hints: Hints) -> Parts:
        """See `Mechanism.attend_shard`."""
        return superlinear_sharded.attend_shard(self, q, rows, group, first, scale, hints)

    def _near(self, q: Tensor, kv: LayerKV, first: int, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to the window and, where they are older, to the sinks."""
        near = attend_window(q, kv, first, self.whole_window, scale)
        older = torch.arange(first, first + q.shape[2], device=q.device).view(1, 1, -1, 1) - self.whole_window
        hi = older.clamp(max=self.sinks - 1).expand(q.shape[0], q.shape[1], -1, -1)
        if not self.sinks or first + q.shape[2] <= self.whole_window:
            return near
        lo = torch.zeros_like(hi)
        out, lse = attend_spans(q, kv, first, lo, hi, self.shifts(kv, first, q.shape[2], hi), scale)
        return each_with_window(*near, out, lse)[0]

    def search(self, q: Tensor, kv: LayerKV, first: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Find the spans of every query of a tile: `find` without the anchors."""
        found = self.find(q, kv, first)
        return None if found is None else found[:3]

    def find(self, q: Tensor, kv: LayerKV, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Find the spans of every query of a tile, and their anchors.

        Args:
            q: unrotated routing queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`.
            kv: the layer.
            first: position of the first query.

        Returns:
            `(scores, lo, hi, anchors)`, each `[B, Hq, T, S]`: search scores (-inf where there is no span), first and
            last key of each span (lo > hi where there is none), anchors (0 where there is none), best first. None where
            no query of the tile has an anchor.
        """
        batch, heads, count, _ = q.shape
        table = offsets(self.power, first + count)
        steps = torch.tensor(table[self.first_anchor - 1 : bisect.bisect_right(table, first + count)])
        if steps.numel() == 0 or self.spans == 0:
            return None
        at = torch.arange(first, first + count).unsqueeze(1)
        anchors = at - steps + 1  # [T, M], newest first
        valid = (anchors >= 0).to(q.device)
        scores = self.scores_of(q, kv, anchors.clamp(min=0)).masked_fill(~valid, float("-inf"))
        # A stable sort keeps the newer anchor first among equals.
        scores, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        scores, order = scores[..., : self.spans], order[..., : self.spans]
        chosen = anchors.to(q.device).expand(batch, heads, -1, -1).gather(-1, order)
        scores, lo, hi = self.around(scores, chosen, first)
        return scores, lo, hi, chosen.clamp(min=0)

    def around(self, scores: Tensor, chosen: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, first and last key of the spans around anchors, each `[B, Hq, T, S]` as in `find`.

        Args:
            scores: -inf where there is no span.
            chosen: their anchors.
            first: position of the first query.
        """
        at = torch.arange(first, first + scores.shape[2]).unsqueeze(1)
        reach = (at + 1).double() ** self.span_power
        backward = torch.ceil(self.backward * reach).long().to(scores.device)
        forward = torch.ceil(self.forward * reach).long().to(scores.device)
        lo = (chosen - backward).clamp(min=0)
        hi = torch.minimum(chosen + forward, at.to(scores.device) - self.whole_window)
        return scores, lo, torch.where(scores == float("-inf"), lo - 1, hi)

    def scores_of(self, q: Tensor, kv: LayerKV, anchors: Tensor) -> Tensor:
        """Return the search scores `[B, Hq, T, M]` of anchors `[T, M]`; of heads that share, their sum."""
        scores = self._scores(q, kv, anchors)
        if self.share == "group":
            grouped = scores.unflatten(1, (kv.kv_heads, -1))
            scores = grouped.sum(2, keepdim=True).expand_as(grouped).flatten(1, 2)
        return scores

    def _scores(self, q: Tensor, kv: LayerKV, anchors: Tensor) -> Tensor:
        if self.summary == "key":
            return _dot(q, kv.gather_keys(anchors))
        # Anchors of one page must score exactly alike for ties to be ties, so each page is scored once.
        pages, which = torch.unique(anchors // PAGE, return_inverse=True)
        bounds = (kv.summary(what) for what in ("lowest", "highest"))
        lowest, highest = (bound[:, :, pages.to(bound.device)].to(q.dtype) for bound in bounds)
        batch, heads, count, dim = q.shape
        grouped = q.reshape(batch, lowest.shape[1], -1, dim)
        scores = grouped.clamp(min=0) @ highest.mT + grouped.clamp(max=0) @ lowest.mT
        return scores.view(batch, heads, count, -1).gather(-1, which.to(q.device).expand(batch, heads, -1, -1))

    def shifts(self, kv: LayerKV, first: int, count: int, hi: Tensor) -> Tensor:
        """Return by how many positions each span `[B, Hq, T, S]` is brought nearer to its query."""
        rotary = kv.rotary
        if rotary is None or rotary.trained_length is None or first + count <= rotary.trained_length:
            return torch.zeros_like(hi)
        at = torch.arange(first, first + count, device=hi.device).view(1, 1, -1, 1)
        beyond = at >= rotary.trained_length
        return torch.where(beyond, at - self.whole_window - hi, torch.zeros_like(hi))

    @property
    def summaries(self) -> tuple[str, ...]:
        """See `Mechanism.summaries`."""
        return ("lowest", "highest") if self.summary == "bounds" else ()

    def within(self, keys: int, n: int) -> Mechanism:
        """See `Mechanism.within`: half for the window, half for the spans, in their present proportions."""
        length = self.backward + self.forward
        if not self.spans or not length:
            return replace(self, window=keys)
        longer = keys / 2 / (self.spans * length * float(n) ** self.span_power)
        return replace(self, window=keys // 2, backward=self.backward * longer, forward=self.forward * longer)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`."""
        anchors = max(0.0, float(n) ** self.power - float(self.whole_window) ** self.power)
        length = min(float(n), (self.backward + self.forward) * float(n) ** self.span_power)
        far = max(0, n - self.whole_window)
        keys = min(n, self.whole_window) + min(float(far), self.spans * length + self.sinks)
        search = 2.0 * shape.query_heads * anchors * shape.head_dim
        decode = shape.read_flops(keys) + search
        # The sum over t of sqrt-like terms is 1 / (1 + power) of the last term times n; the window's is constant.
        share = 1.0 / (1.0 + max(self.power, self.span_power))
        prefill = n * (
            shape.read_flops(min(n, self.whole_window)) + share * (decode - shape.read_flops(min(n, self.whole_window)))
        )
        number_bytes = 2 * shape.summary_bytes if self.summary == "bounds" else shape.kv_bytes
        searched = anchors * shape.kv_heads * shape.head_dim * number_bytes
        # Each query head reads spans of its own, or a group those of all its heads.
        spread = shape.query_heads / shape.kv_heads if self.share == "head" else 1.0
        span_bytes = min(float(far), self.spans * length * spread + self.sinks) * shape.token_bytes
        return Cost(
            decode_flops=decode,
            decode_bytes=min(n, self.whole_window) * shape.token_bytes + span_bytes + searched,
            prefill_flops=prefill,
            kept_bytes=n * shape.token_bytes,
            decode_keys=keys + anchors,
        )


def _dot(q: Tensor, k: Tensor) -> Tensor:
    """Return `q . k` for q `[B, Hq, T, D]` and k `[B, Hkv, T, M, D]` as `[B, Hq, T, M]` in q's type.

    Summed in float64: in float32 equal keys would score differently by where they stand in a product, and ties would
    not be ties (a text that repeats itself has many).
    """
    batch, heads, count, dim = q.shape
    grouped = q.double().view(batch, k.shape[1], heads // k.shape[1], count, dim)
    return torch.einsum("bhgtd,bhtmd->bhgtm", grouped, k.double()).reshape(batch, heads, count, -1).to(q.dtype)
