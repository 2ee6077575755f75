"""SparQ: the blocks of keys with the most attention, as the query's largest channels tell it.

SparQ Attention: Bandwidth-Efficient LLM Inference (arXiv 2312.04985, section 4 and algorithm 1). Most of a score comes
from few channels: those in which the query is large. For a KV head let `c` be the `channels` channels with the greatest
sum of `|q_d|` over its query heads; the approximate score of key j is `s_j = sum_{d in c} q_d k_jd / sqrt(D tau)`,
`tau = sum_{d in c} |q_d| / sum_d |q_d|`. What scores best is read exactly. What differs from the paper:

- what is chosen are blocks of `block` keys (1: keys, as there). A block scores the logarithm of its mass,
  `log sum_j exp s_j`, so that a softmax over blocks gives each its share of all mass;
- a window and sinks are always read, the first layers read everything, and who chooses is an option (`choosing.py`);
- the mean value does not stand for what was not read: one softmax over what was, as in the other mechanisms here.

Scores are of rotated keys up to the length that the model was trained on, beyond it of unrotated keys and queries:
where a block will be read is only known once it is chosen. As in the paper keys are kept a second time, channel by
channel, where memory is not limited; where it is, a step reads all keys to take the channels from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from longspan.attention.base import Cost, Shape, at_least
from longspan.attention.choosing import Choosing
from longspan.attention.indexed import reads_own_positions
from longspan.errors import UsageError
from longspan.kv.base import LayerKV

_PIECE = 1 << 22
"""Scores of keys held at once; those of their blocks are kept."""


@dataclass(frozen=True)
class SparQ(Choosing):
    """Reads the blocks that get the most attention by the query's largest channels."""

    channels: int = 16
    """Channels of a KV head by which keys are scored."""
    block: int = 4  # type: ignore[misc]  # an option here, a constant of the class elsewhere
    """Keys that are chosen together: 1, 2, 4, 8 or 16."""

    name: ClassVar[str] = "sparq"
    about: ClassVar[str] = "the keys with the most attention, as the query's largest channels tell it"
    source: ClassVar[str] = "arXiv 2312.04985"
    decode_order: ClassVar[str] = "n"
    prefills: ClassVar[bool] = False
    tile: ClassVar[int] = 16

    def __post_init__(self) -> None:
        """Refuse options out of range."""
        super().__post_init__()
        at_least("channels", self.channels, 1)
        if self.block not in (1, 2, 4, 8, 16):
            raise UsageError(f"block={self.block} does not fit into pages: use 1, 2, 4, 8 or 16")

    def scores(self, q: Tensor, kv: LayerKV, first: int, blocks: int, scale: float) -> Tensor:
        """See `Choosing.scores`."""
        batch, heads, count, dim = q.shape
        rotated = kv.rotary is not None and reads_own_positions(kv, first + count)
        if kv.rotary is not None and rotated:
            q = kv.rotary.range(q, first)
        columns = kv.columns(blocks * self.block, rotated=rotated)  # [B, Hkv, D, n]
        groups = batch * kv.kv_heads
        columns = columns.expand(batch, -1, -1, -1).flatten(0, 1)
        grouped = q.reshape(groups, -1, count, dim)
        magnitude = grouped.abs()
        # Of equal channels the first: a stable sort, so that the choice is the same everywhere.
        order = magnitude.sum(1).sort(dim=-1, descending=True, stable=True).indices[..., : self.channels]
        used = order.unsqueeze(1).expand(-1, grouped.shape[1], -1, -1)  # [B Hkv, G, T, R]
        part = grouped.gather(-1, used)
        whole = magnitude.sum(-1, keepdim=True)
        portion = torch.where(whole > 0, part.abs().sum(-1, keepdim=True) / whole, 1)
        part = part * (scale / portion.sqrt())
        if count == 1:
            rows, columns = part.squeeze(2), _taken(columns, order.squeeze(1))
        else:
            # Every query has channels of its own: zeros in the others cost less than a gather for each.
            rows = torch.zeros_like(grouped).scatter(-1, used, part).flatten(1, 2)
        step = max(1, _PIECE // (groups * rows.shape[1]) // 16) * 16
        pieces = [_block_mass(rows, piece, self.block) for piece in columns.split(step, -1)]
        return torch.cat(pieces, -1).view(batch, heads, count, blocks)

    def _scored(self, shape: Shape) -> float:
        """See `Choosing._scored`: a part of every key; of quantised pages every key as it is held."""
        share = shape.kv_bytes / shape.summary_bytes
        return self.block * (min(self.channels, shape.head_dim) / shape.head_dim if share >= 1 else share)

    def cost(self, n: int, shape: Shape) -> Cost:
        """See `Mechanism.cost`; keys that are searched are kept twice, unless pages are quantised."""
        cost = super().cost(n, shape)
        twice = self.who != "model" and shape.kv_bytes >= shape.summary_bytes
        return replace(
            cost, kept_bytes=cost.kept_bytes + twice * n * shape.kv_heads * shape.head_dim * shape.summary_bytes
        )


def _taken(columns: Tensor, order: Tensor) -> Tensor:
    """Return the channels `[B Hkv, R, n]` that each KV head wants, `order` `[B Hkv, R]`, of `[B Hkv, D, n]`."""
    starts = torch.arange(0, columns.shape[0] * columns.shape[1], columns.shape[1], device=order.device).unsqueeze(1)
    return columns.flatten(0, 1).index_select(0, (order + starts).flatten()).view(*order.shape, -1)


def _block_mass(q: Tensor, columns: Tensor, block: int) -> Tensor:
    """Return the logarithm of each block's mean mass `[b, G, n / block]`: q `[b, G, R]`, columns `[b, R, n]`."""
    scores = torch.bmm(q, columns.to(q.dtype))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if block == 1 or not scores.numel():
        return scores[..., ::block]
    # Half the time of `logsumexp` over four neighbours; what is too small for the type is as good as nothing.
    top = scores.amax(-1, keepdim=True)
    mass = torch.nn.functional.avg_pool1d((scores - top).exp_(), block)
    return mass.clamp_(min=torch.finfo(mass.dtype).tiny).log_().add_(top)
