"""Teaching routing queries where dense attention looks: the far keys' mass, cell by cell, as a target.

Superlinear searches anchors and reads spans around the best. The anchors of a query cut its far past into cells, the
keys from one anchor (not included) to the next newer one; an anchor's span holds its cell whole (`backward` of at least
2, power 0.5). With p the dense attention weights of a head, and s the search scores of its anchors,

    target_i = sum of p over cell i / sum of p over all cells,      loss = KL(target || softmax(s / sqrt(D)))

weighed by how much of the head's attention is far at all. The model is frozen and attends densely: only routing queries
learn. That is the warm-up of DeepSeek-V3.2's indexer (arXiv 2512.02556, section 2.1), with two differences: a target a
head instead of one for all, and cells, which overlap nowhere, instead of tokens, so that the best anchors are not
neighbours around one key. It does not know data, optimisers or layers' number.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention.spans import disjoint
from longspan.attention.superlinear import Superlinear
from longspan.kernels.superlinear import offsets
from longspan.kv.rotary import Rotary


@dataclass(frozen=True)
class Looked:
    """Where some queries of a layer looked, densely, before their windows."""

    rows: Tensor
    """int64 `[R]`, positions of the queries, all with an anchor at least."""
    anchors: Tensor
    """int64 `[R, M]`, newest first; what is not valid is 0."""
    valid: Tensor
    """bool `[R, M]`."""
    sums: Tensor
    """`[B, Hq, R, N + 1]`: attention weights of the keys before each."""

    @property
    def cells(self) -> Tensor:
        """Mass of each anchor's cell, `[B, Hq, R, M]`; the oldest anchor's reaches back to the first key."""
        upper = self._before(torch.where(self.valid, self.anchors + 1, 0))
        lower = torch.cat([upper[..., 1:], torch.zeros_like(upper[..., :1])], -1)
        return upper - lower

    def covered(self, mechanism: Superlinear, scores: Tensor) -> Tensor:
        """Return the mass that lies in the spans of the best-scored anchors, `[B, Hq, R]`.

        Args:
            mechanism: has as many spans, of such a length.
            scores: `[B, Hq, R, M]`.
        """
        count = min(mechanism.spans, scores.shape[-1])
        best = scores.masked_fill(~self.valid, float("-inf")).topk(count, -1)
        chosen = self.anchors.expand(*scores.shape).gather(-1, best.indices)
        at = self.rows.view(-1, 1)
        reach = (at + 1).double() ** mechanism.span_power
        lo = (chosen - torch.ceil(mechanism.backward * reach).long()).clamp(min=0)
        hi = torch.minimum(chosen + torch.ceil(mechanism.forward * reach).long(), at - mechanism.whole_window)
        hi = torch.where(best.values == float("-inf"), lo - 1, hi)
        lo, hi, _ = disjoint(lo, hi, torch.zeros_like(lo))
        found = self._before((hi + 1).clamp(min=0)) - self._before(lo)
        return torch.where(lo <= hi, found, 0.0).sum(-1)

    def _before(self, index: Tensor) -> Tensor:
        return self.sums.gather(-1, index.expand(*self.sums.shape[:3], -1))


@torch.no_grad()
def look(
    q: Tensor, k: Tensor, rows: Tensor, mechanism: Superlinear, scale: float, rotary: Rotary | None
) -> Looked | None:
    """Return where queries look densely; None: none of them has an anchor.

    Args:
        q: unrotated `[B, Hq, T, D]` of a whole text.
        k: unrotated `[B, Hkv, T, D]`.
        rows: int64 `[R]`, which queries.
        mechanism: whose window and anchors.
        scale: what scores are multiplied by.
        rotary: how positions are given; None: there are none.
    """
    table = offsets(mechanism.power, int(q.shape[2]) + 1)
    first = mechanism.first_anchor - 1
    rows = rows[rows + 1 >= table[first]]
    if not rows.numel():
        return None
    steps = torch.tensor(table[first : bisect.bisect_right(table, int(rows.max()) + 1)])
    anchors = rows.cpu().view(-1, 1) - steps + 1
    asked = q[:, :, rows]
    if rotary is not None:
        asked, k = rotary(asked, rows), rotary.range(k, 0)
    grouped = asked.float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, R, D]
    scores = (grouped @ k.float().unsqueeze(2).mT).flatten(1, 2) * scale
    later = torch.arange(k.shape[2], device=k.device) > rows.view(-1, 1).to(k.device)
    weights = torch.softmax(scores.masked_fill_(later, float("-inf")), -1)
    sums = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    to = q.device
    return Looked(rows.to(to), anchors.clamp(min=0).to(to), (anchors >= 0).to(to), sums)


def search_scores(routing: Tensor, k: Tensor, looked: Looked) -> Tensor:
    """Return the search scores `[B, Hq, R, M]` of all anchors, unscaled, in float32.

    Args:
        routing: routing queries `[B, Hq, R, D]` of the rows looked at.
        k: unrotated keys `[B, Hkv, T, D]`.
        looked: has the anchors.
    """
    grouped = routing.float().unflatten(1, (k.shape[1], -1))
    return torch.einsum("bhgrd,bhrmd->bhgrm", grouped, k[:, :, looked.anchors].float()).flatten(1, 2)


def divergence(looked: Looked, scores: Tensor, scale: float) -> Tensor:
    """Return the loss of the module, a scalar: the mean over rows and heads, weighed by the mass that is far.

    Args:
        looked: targets.
        scores: `[B, Hq, R, M]`, unscaled.
        scale: what they are multiplied by before the softmax.
    """
    cells = looked.cells.clamp(min=0)
    far = cells.sum(-1, keepdim=True)
    target = cells / far.clamp(min=1e-9)
    logits = torch.log_softmax((scores * scale).masked_fill(~looked.valid, float("-inf")), -1)
    apart = target * (torch.log(target.clamp(min=1e-12)) - logits.masked_fill(~looked.valid, 0.0))
    return (apart.sum(-1) * far.squeeze(-1)).sum() / far.sum().clamp(min=1e-9)
