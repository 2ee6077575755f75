"""Ring attention: exact causal attention over a context whose keys and values go round all ranks.

Every rank holds some queries and some keys and values. In P steps each attends from its own queries to one rank's keys,
while these are sent on to the next rank and the previous rank's are received: P-1 passes, two buffers, nothing gathered
(Ring Attention with Blockwise Transformers, arXiv 2310.01889). In zigzag order every rank computes the same number of
pairs, and only those that are seen (`blocks.py`). Partial outputs are summed up in float32 by their log-sum-exps, and
rounded once: summing them up in a half type, as early implementations do, costs more with every rank that is added.

What is sent is launched before a step's compute, so that on a GPU NCCL's stream, of high priority, runs beside it.
Grouped queries are never met by copies of their keys. A later chunk's queries attend to all before it in the same way:
`keys` is then the sum of the chunks' layouts. In the backward pass keys and values go round again, followed by their
gradients in float32, one step behind; what is differentiated twice is refused by PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.distributed.blocks import blocks
from longspan.distributed.group import Group
from longspan.distributed.layout import Layout
from longspan.distributed.merge import merge_into
from longspan.distributed.parts import attend_part, computed, part_gradients
from longspan.errors import UsageError


def ring_attention(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend causally from this rank's queries to the keys of all ranks.

    Args:
        group: the ranks; all of them must call it.
        q: `[B, Hq, T, D]`, this rank's rows of `queries`; positions, if any, are in q and k already.
        k: `[B, Hkv, N, D]`, this rank's rows of `keys`.
        v: `[B, Hkv, N, Dv]`.
        queries: which positions attend; `layout.zigzag` shares the work out evenly.
        keys: which positions are attended to, from 0 on; None: those of the queries.
        scale: what scores are multiplied by; None: `1/sqrt(D)`.

    Returns:
        `[B, Hq, T, Dv]` in q's type: dense attention's rows, to rounding. Differentiable.

    Raises:
        UsageError: tensors that don't fit the layouts or each other.
        ParallelError: a rank stopped or did not answer.
    """
    keys = queries if keys is None else keys
    check(group, q, k, v, queries, keys)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out: Tensor = _Ring.apply(q, k, v, group, queries, keys, scale)  # type: ignore[no-untyped-call]
    return out


def check(group: Group, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout) -> None:
    """Refuse what would be read wrongly (UsageError)."""
    told = f"rank {group.rank} of {group.size}"
    if queries.ranks != group.size or keys.ranks != group.size:
        raise UsageError(f"{told}: a layout over {queries.ranks} and {keys.ranks} ranks: lay both over {group.size}")
    wanted = (queries.counts[group.rank], keys.counts[group.rank], keys.counts[group.rank])
    for name, x, rows in zip("qkv", (q, k, v), wanted, strict=True):
        if x.dim() != 4 or x.shape[2] != rows:
            raise UsageError(f"{told}: {name} is {tuple(x.shape)} where its layout has {rows} rows: shard it by that")
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise UsageError(
            f"{told}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: give one batch and head size, "
            "and query heads that are a multiple of KV heads"
        )


class _Buffers:
    """Room for other ranks' tensors of several sizes, in turns."""

    def __init__(self, like: Sequence[Tensor], most: int, turns: int) -> None:
        self._like = like
        self._flat = [
            [x.new_empty(x.shape[0] * x.shape[1] * most * x.shape[3]) for x in like] for _ in range(turns)
        ]  # fmt: skip

    def take(self, turn: int, rows: int) -> list[Tensor]:
        """Return contiguous tensors `[B, H, rows, D]` of a turn's memory."""
        made = []
        for flat, x in zip(self._flat[turn % len(self._flat)], self._like, strict=True):
            shape = (x.shape[0], x.shape[1], rows, x.shape[3])
            made.append(flat[: math.prod(shape)].view(shape))
        return made


class _Ring(torch.autograd.Function):
    """The passes, forwards and backwards."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group, queries: Layout, keys: Layout, scale: float
    ) -> Tensor:
        out, lse = forward(group, q, k, v, queries, keys, scale)
        rounded = out.to(q.dtype)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(q, k, v, rounded, lse)
            ctx.given = group, queries, keys, scale
        return rounded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(grad, q, k, v, out, lse, *ctx.given), None, None, None, None


def forward(
    group: Group, q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output `[B, Hq, T, Dv]` and log-sum-exp `[B, Hq, T]` over all keys, in the computing type."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=computed(q), device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    held = [k.contiguous(), v.contiguous()]
    buffers = _Buffers(held, max(keys.counts), min(2, group.size - 1))
    for step in range(group.size):
        source = (group.rank - step) % group.size
        last = step == group.size - 1
        if not last:
            coming = buffers.take(step, keys.counts[source - 1])
            pending = group.exchange(held, coming)
        for block in blocks(queries, group.rank, keys, source):
            rows, seen = slice(*block.queries), slice(*block.keys)
            part, part_lse = attend_part(
                q[:, :, rows], held[0][:, :, seen], held[1][:, :, seen], scale=scale, causal=block.causal
            )
            merge_into(out[:, :, rows], lse[:, :, rows], part, part_lse)
            del part, part_lse
        if not last:
            pending.wait()
            held = coming
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    group: Group, queries: Layout, keys: Layout, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of this rank's q, k and v.

    The gradients of a rank's keys go round behind them: they are received after a step's compute, which is added, and
    are at home again after the last.
    """
    dtype = computed(q)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    held = [k.contiguous(), v.contiguous()]
    summed = [torch.zeros(x.shape, dtype=dtype, device=q.device) for x in held]
    most = max(keys.counts)
    buffers, sums = _Buffers(held, most, min(2, group.size - 1)), _Buffers(summed, most, 2)
    following = None
    for step in range(group.size):
        source = (group.rank - step) % group.size
        last = step == group.size - 1
        if not last:
            coming = buffers.take(step, keys.counts[source - 1])
            pending = group.exchange(held, coming)
        added = [torch.zeros(x.shape, dtype=dtype, device=q.device) for x in held]
        for block in blocks(queries, group.rank, keys, source):
            rows, seen = slice(*block.queries), slice(*block.keys)
            shares = part_gradients(
                grad[:, :, rows], q[:, :, rows], held[0][:, :, seen], held[1][:, :, seen],
                out[:, :, rows], lse[:, :, rows], scale=scale, causal=block.causal,
            )  # fmt: skip
            dq[:, :, rows] += shares[0]
            added[0][:, :, seen] += shares[1]
            added[1][:, :, seen] += shares[2]
        if following is not None:
            following.wait()
        for i in range(2):
            summed[i] += added[i]
        # To the next rank, which now has these keys; the last step's go home.
        arriving = sums.take(step, keys.counts[source - 1])
        following = group.exchange(summed, arriving)
        summed = arriving
        if not last:
            pending.wait()
            held = coming
    assert following is not None
    following.wait()
    return dq.to(q.dtype), summed[0].to(k.dtype), summed[1].to(v.dtype)
