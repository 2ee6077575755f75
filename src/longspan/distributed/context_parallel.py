"""Exact attention over several ranks in one message: keys are gathered, or queries are, or one token asks all ranks.

- `gather_attention`: every rank gathers all keys and values of a layer and attends from its own queries. One message
  and one or two large kernels: for contexts so short that a ring's passes would wait more than they compute.
- `spread_attention`: queries are known to every rank, each attends to the keys it holds, and outputs merge by their
  log-sum-exps. What travels does not depend on the context: for decode, questions, and short chunks over a long past
  (pass-Q, arXiv 2411.01783; Tree Attention, arXiv 2408.04093).
- `decode_attention`: the same for one token, in shapes that do not depend on lengths, so that a CUDA graph holds it:
  one kernel over the rank's own keys and one small message a layer.

`choose` says which of these, or the ring, serves a chunk. All are dense attention to rounding; keys and values are
never repeated for grouped queries. PyTorch's own `context_parallel` (torch.distributed.tensor.experimental) is measured
beside them in `longspan.bench.parallel`, and used nowhere: up to 2.13 it takes equal shards alone (lengths that are
multiples of twice the ranks), no keys from before a chunk, and CUDA tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longspan.distributed.blocks import blocks
from longspan.distributed.group import Group
from longspan.distributed.layout import Layout, contiguous
from longspan.distributed.merge import merge_into
from longspan.distributed.parts import attend_part, computed
from longspan.distributed.ring import check
from longspan.errors import UsageError
from longspan.kernels import dense_decode
from longspan.kernels.held import Held
from longspan.kernels.partial_attention import partial_attention

GATHER_BYTES = 16 << 20
"""Keys and values of a layer up to this are gathered: NVLink carries them in the time of a few passes' latency."""
_HIDES = 512
"""Queries of a rank from which on a ring's compute hides what it sends (docs/distributed.md has the arithmetic)."""


def choose(queries: int, keys: int, ranks: int, query_bytes: float, key_bytes: float) -> str:
    """Return `ring`, `gather` or `spread` for queries of a chunk over all keys up to its end.

    Args:
        queries: T of all ranks together.
        keys: N of all ranks together.
        ranks: how many.
        query_bytes: of one position's query in, and partial output out.
        key_bytes: of one position's keys and values.
    """
    if ranks == 1 or queries < ranks:
        return "spread"
    if keys * key_bytes <= GATHER_BYTES:
        return "gather" if queries * query_bytes >= keys * key_bytes / ranks else "spread"
    if queries / ranks < _HIDES and queries * query_bytes < keys * key_bytes / ranks:
        return "spread"
    return "ring"


def gather_attention(
    group: Group,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend causally after gathering all keys and values; arguments, result and errors as for `ring_attention`.

    It has no gradients of its own making: the ring is for training.
    """
    keys = queries if keys is None else keys
    check(group, q, k, v, queries, keys)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UsageError("gathered attention gives no gradients: use ring_attention")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = (keys.whole(_shards(group, x, keys)) for x in (k, v))
    everywhere = contiguous(keys.stop - keys.first, 1, keys.first)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=computed(q), device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    for block in blocks(queries, group.rank, everywhere, 0):
        rows, seen = slice(*block.queries), slice(*block.keys)
        part = attend_part(q[:, :, rows], k[:, :, seen], v[:, :, seen], scale=scale, causal=block.causal)
        merge_into(out[:, :, rows], lse[:, :, rows], *part)
    return out.to(q.dtype)


def spread_attention(
    group: Group, q: Tensor, k: Tensor, v: Tensor, first: int, keys: Layout, *, scale: float | None = None
) -> Tensor:
    """Attend causally from queries that every rank has to the keys of all.

    Args:
        group: the ranks; all of them must call it.
        q: `[B, Hq, T, D]`, the same on every rank, of the positions `first .. first + T - 1`.
        k: `[B, Hkv, N, D]`, this rank's rows of `keys`.
        v: `[B, Hkv, N, Dv]`.
        first: position of the first query.
        keys: which positions are attended to, those of the queries included.
        scale: what scores are multiplied by; None: `1/sqrt(D)`.

    Returns:
        `[B, Hq, T, Dv]` in q's type, the same bits on every rank.

    Raises:
        UsageError: tensors that don't fit the layout or each other.
        ParallelError: a rank stopped or did not answer.
    """
    everywhere = Layout((((first, first + q.shape[2]),),) * group.size)
    check(group, q, k, v, everywhere, keys)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=computed(q), device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=out.dtype, device=q.device)
    for block in blocks(everywhere, group.rank, keys, group.rank):
        rows, seen = slice(*block.queries), slice(*block.keys)
        part = attend_part(q[:, :, rows], k[:, :, seen], v[:, :, seen], scale=scale, causal=block.causal)
        merge_into(out[:, :, rows], lse[:, :, rows], *part)
    return group.merge(out, lse)[0].to(q.dtype)


def decode_attention(
    group: Group, q: Tensor, k: Tensor | Held, v: Tensor | Held, lengths: Tensor | None = None, *, scale: float
) -> Tensor:
    """Attend from the newest token of every sequence to the keys that all ranks hold.

    Args:
        group: the ranks; all of them must call it.
        q: `[B, Hq, D]`, the same on every rank; positions, if any, are in q and k already.
        k: this rank's keys, `[B, Hkv, N, D]` or as they are held; there may be none.
        v: this rank's values.
        lengths: int64 `[B]` on the device, this rank's keys of each sequence; None: all N.
        scale: what scores are multiplied by.

    Returns:
        `[B, Hq, Dv]` in q's type, the same bits on every rank.
    """
    if lengths is None and isinstance(k, Tensor) and isinstance(v, Tensor) and not q.is_cuda:
        out, lse = partial_attention(q.to(computed(q)).unsqueeze(2), k, v, scale=scale)
        out, lse = out.squeeze(2), lse.squeeze(2)
    else:
        k, v = (x if isinstance(x, Held) else Held(x) for x in (k, v))
        lengths = torch.full((len(q),), k.capacity, device=q.device) if lengths is None else lengths
        out, lse = dense_decode.partial(q, k, v, lengths, scale=scale)
    return group.merge(out, lse)[0].to(q.dtype)


def _shards(group: Group, x: Tensor, layout: Layout) -> list[Tensor]:
    """Return every rank's rows; what is gathered has one size, so shorter shards travel with rows of no meaning."""
    most = max(layout.counts)
    if x.shape[2] < most:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], most - x.shape[2], x.shape[3])], 2)
    return [shard[:, :, :count] for shard, count in zip(group.gather(x), layout.counts, strict=True)]
