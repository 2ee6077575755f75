"""How the needle model attends while it learns, and how it learns where to search.

Text sees what is before it, or only its own segment: then a long text costs no more a token than a short one, and the
model can't rely on what a sparse mechanism would not show it. Questions see everything before them, or only what a
search finds, as under superlinear.

Superlinear finds a place by one key, its anchor's, in place of all keys around it, so that the anchors' keys have to
hold what was said since the anchor before. They do where they are taught to: routing queries AND keys learn together,
by the loss of `train/distil.py` at the tokens that answer, heads that look at one place above those that look
everywhere. Anchors are spread by a random factor (`stretch`), and spans with them: those of a text of a million tokens
lie as far apart as no text of the training has them. It does not know models, batches or losses of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from longspan.hf.routing import Routing

SINKS = 4
"""First keys that every query reads (superlinear's `sinks`): they need not be searched for."""
_SPANS, _BACKWARD = 3, 3
"""Superlinear's defaults."""


@dataclass
class Attending:
    """Attention of one step's layers (`hf.training.Attend`)."""

    split: int
    """Where questions begin."""
    segment: int
    """Tokens of text that see each other; `split`: all."""
    scale: float
    routing: list[Routing] = field(default_factory=list)
    """Of each layer; none: searching is not learnt."""
    rows: Tensor | None = None
    """int64 `[B, R]`, the positions whose search learns."""
    near: int = 64
    """Newest keys that need not be searched for."""
    stretch: float = 1.0
    sparse: bool = False
    """Whether questions see only what is near and what they find."""
    losses: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    """Of what the loss weighs, the share in the best three cells, a layer each."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `hf.training.Attend`."""
        if self.routing and self.rows is not None:
            with torch.autocast(q.device.type, enabled=False):
                self._learn(self.routing[layer], q.float(), k.float())
        groups = q.shape[1] // k.shape[1]
        text_whole, asked_whole = self.segment >= self.split, not self.sparse
        wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if text_whole and asked_whole:
            return F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True, scale=self.scale)
        of_q, of_k, of_v = (_folded(x[:, :, : self.split], min(self.segment, self.split)) for x in (q, wide_k, wide_v))
        text = F.scaled_dot_product_attention(of_q, of_k, of_v, is_causal=True, scale=self.scale)
        text = text.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        at = torch.arange(k.shape[2], device=k.device)
        rows = at[self.split :]
        seen = at <= rows.unsqueeze(1)
        if self.sparse:
            with torch.no_grad():
                seen = seen & self._shown(self.routing[layer], q[:, :, self.split :], k, rows, at)
        asked = F.scaled_dot_product_attention(q[:, :, self.split :], wide_k, wide_v, attn_mask=seen, scale=self.scale)
        return torch.cat([text, asked], 2)

    def _anchors(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the anchors of rows, newest first, in a last axis behind theirs, and which of them there are."""
        first = math.ceil(math.sqrt(self.near + 1) / self.stretch)
        count = max(1, int(math.sqrt(length) / self.stretch) - first + 1)
        steps = ((first + torch.arange(count, device=rows.device)) * self.stretch).square().long()
        anchors = rows.unsqueeze(-1) - steps + 1
        return anchors.clamp(min=SINKS), anchors >= SINKS

    def _shown(self, routing: Routing, q: Tensor, k: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        """Return bool `[B, Hq, R, T]`: keys of the best three spans of each query, those that are near, and sinks.

        Args:
            routing: of the layer.
            q: `[B, Hq, R, D]`.
            k: `[B, Hkv, T, D]`.
            rows: int64 `[R]`, where the queries stand.
            at: int64 `[T]`, every position.
        """
        anchors, valid = self._anchors(rows, k.shape[2])
        searching = routing(q).unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("bhgrd,bhrmd->bhgrm", searching, k[:, :, anchors]).flatten(1, 2).float()
        best = scores.masked_fill(~valid, float("-inf")).topk(min(_SPANS, scores.shape[-1]), -1)
        chosen = anchors.expand(*scores.shape).gather(-1, best.indices)
        reach = (rows + 1).double().sqrt().mul(self.stretch).view(-1, 1)
        lo = chosen - (_BACKWARD * reach).ceil().long()
        hi = torch.minimum(chosen + reach.ceil().long(), rows.view(-1, 1) - self.near)
        hi = torch.where(best.values == float("-inf"), lo - 1, hi)
        seen = (at > rows.unsqueeze(1) - self.near) | (at < SINKS)
        for i in range(lo.shape[-1]):
            seen = seen | ((at >= lo[..., i : i + 1]) & (at <= hi[..., i : i + 1]))
        return seen

    def _learn(self, routing: Routing, q: Tensor, k: Tensor) -> None:
        """Compare where a layer searches with where it looks."""
        assert self.rows is not None
        rows, length = self.rows, k.shape[2]
        asked = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        anchors, valid = self._anchors(rows, length)
        with torch.no_grad():
            scores = torch.einsum("bhgrd,bhnd->bhgrn", asked.unflatten(1, (k.shape[1], -1)), k).flatten(1, 2)
            later = torch.arange(length, device=k.device) > rows.unsqueeze(-1)
            weights = torch.softmax((scores * self.scale).masked_fill_(later.unsqueeze(1), float("-inf")), -1)
            cells = _cells(F.pad(weights.cumsum(-1), (1, 0)), anchors.unsqueeze(1), valid.unsqueeze(1))
            far = cells.sum(-1, keepdim=True)
            target = cells / far.clamp(min=1e-9)
            weight = far.squeeze(-1) * target.square().sum(-1)
        batch = torch.arange(len(rows), device=k.device).view(-1, 1, 1)
        held = k.transpose(1, 2)[batch, anchors]  # [B, R, M, Hkv, D]
        searching = routing(asked).unflatten(1, (k.shape[1], -1))
        found = torch.einsum("bhgrd,brmhd->bhgrm", searching, held).flatten(1, 2) * self.scale
        found = found.masked_fill(~valid.unsqueeze(1), float("-inf"))
        logits = torch.log_softmax(found, -1).masked_fill(~valid.unsqueeze(1), 0.0)
        apart = (target * (torch.log(target.clamp(min=1e-12)) - logits)).sum(-1)
        # A row without any anchor has no mass either, and no number for a softmax of nothing.
        apart = torch.where(valid.any(-1).unsqueeze(1), apart, 0.0)
        self.losses.append((apart * weight).sum() / (weight.sum() + 1e-3 * weight.numel()))
        with torch.no_grad():
            best = target.gather(-1, found.topk(min(_SPANS, found.shape[-1]), -1).indices).sum(-1)
            self.found.append((best * weight).sum() / weight.sum().clamp(min=1e-9))


def _cells(sums: Tensor, anchors: Tensor, valid: Tensor) -> Tensor:
    """Return the mass from each anchor back to the next older one (not included), the oldest's back to the sinks.

    Args:
        sums: `[B, Hq, R, T + 1]`: weights of the keys before each.
        anchors: int64 `[B, 1, R, M]`, newest first.
        valid: bool, which there are.
    """
    index = torch.where(valid, anchors + 1, SINKS)  # what is not valid begins and ends at the sinks
    upper = sums.gather(-1, index.expand(-1, sums.shape[1], -1, -1))
    lower = torch.cat([upper[..., 1:], sums[..., SINKS : SINKS + 1]], -1)
    return torch.clamp(upper - lower, min=0)


def _folded(x: Tensor, segment: int) -> Tensor:
    """Return `[B, H, T, D]` as `[B T / segment, H, segment, D]`."""
    folded: Tensor = x.unflatten(2, (-1, segment)).transpose(1, 2).flatten(0, 1)
    return folded
