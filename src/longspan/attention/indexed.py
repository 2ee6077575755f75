"""Attention of every query to keys that were chosen for it, given by index.

Chosen keys are older than the query's window. Up to the length that the model was trained on, all keys are read at
their true positions. Beyond it they are read as if they stood in order directly before the window (compact positions,
as StreamingLLM, arXiv 2309.17453, counts them inside the cache), so that no distance exceeds the number of keys read.

Two ways lead to the same result: gather what each query reads, or read the whole context once under a mask. A gathered
key serves the heads of one group and one query only, so a mask is cheaper until the context is several times as long
as what a query reads. This file does not know who chose, or how.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longspan.kernels.partial_attention import partial_attention
from longspan.kv.base import LayerKV

_MASKED = 8
"""A mask is taken for up to this many times the keys that one query reads (measured on a CPU)."""

_GATHERED = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Numbers of keys gathered at once, which bounds memory; a CPU's also stay in its cache."""


def reads_own_positions(kv: LayerKV, stop: int) -> bool:
    """Return whether a context of `stop` tokens is read at true positions: no longer than the model was trained on."""
    return kv.rotary is None or kv.rotary.trained_length is None or stop <= kv.rotary.trained_length


def true_positions(kv: LayerKV, first: int, count: int) -> int:
    """Return how many of the queries `first .. first + count - 1` read keys at true positions: the first so many."""
    if kv.rotary is None or kv.rotary.trained_length is None:
        return count
    return min(max(0, kv.rotary.trained_length - first), count)


def attend_indexed(
    q: Tensor,
    kv: LayerKV,
    first: int,
    windows: Tensor,
    index: Tensor,
    valid: Tensor | None,
    scale: float,
    *,
    near: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend to chosen keys, alone or together with the window.

    Args:
        q: unrotated queries `[B, Hq, T, D]` of the positions `first .. first + T - 1`, which must not lie on both sides
            of the trained length (`true_positions`).
        kv: the layer.
        first: position of the first query.
        windows: int64 `[T]` on the CPU, keys in each query's window, its own included; chosen keys are older.
        index: int64 `[B or 1, Hkv or 1, T, F]`, the tokens chosen, each once; beyond the trained length in ascending
            order, where entries that are not valid come first. Those may be any token that is held.
        valid: bool, shaped as `index`; None: every entry is.
        scale: what scores are multiplied by.
        near: whether the window is read too, in the same softmax.

    Returns:
        `(out [B, Hq, T, Dv], lse [B, Hq, T])`; 0 and -inf for a query that reads nothing.
    """
    batch, _, count, dim = q.shape
    own = reads_own_positions(kv, first + count)
    assert true_positions(kv, first, count) == own * count, "queries on both sides of the trained length are read apart"
    kv_heads = kv.kv_heads if index.shape[1] == 1 else index.shape[1]
    if count == 1:
        return attend_gathered(q, kv, first, windows, index, valid, scale, own, near, kv_heads)
    reads = index.shape[-1] + (int(windows.max()) if near else 0)
    if own and first + count <= _MASKED * reads and kv.readable() is None:
        return _attend_masked(q, kv, first, _mask(first, windows, index, valid, near), scale)
    step = max(1, _GATHERED.get(q.device.type, _GATHERED["cuda"]) // max(1, batch * kv_heads * reads * dim))
    parts = []
    for start in range(0, count, step):
        part = slice(start, start + step)
        some = None if valid is None else valid[:, :, part]
        parts.append(
            attend_gathered(
                q[:, :, part], kv, first + start, windows[part], index[:, :, part], some, scale, own, near, kv_heads
            )
        )
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def attend_blocks(q: Tensor, kv: LayerKV, position: int, start: int, blocks: Tensor, size: int, scale: float) -> Tensor:
    """Attend from one query to chosen blocks and its window, as `attend_indexed` does, block by block.

    Args:
        q: unrotated `[B, Hq, 1, D]`.
        kv: the layer, which ends with the query's own key; every block can be read token by token.
        position: the query's.
        start: first key of its window, where a block begins.
        blocks: int64 `[B or 1, Hkv or 1, P]`, ascending, before the window, each once.
        size: tokens in a block.
        scale: what scores are multiplied by.

    Returns:
        `[B, Hq, 1, Dv]`.
    """
    own = reads_own_positions(kv, position + 1)
    shape = (q.shape[0], kv.kv_heads, -1)
    near = _near(start // size, position // size + 1, q.device)
    index = torch.cat([blocks.expand(shape), near.expand(shape)], -1)
    k, v = kv.gather_blocks(index, size, rotated=own)
    # The window comes last: what stands in its block behind the query is cut off.
    reads = blocks.shape[-1] * size + position + 1 - start
    k, v = k[:, :, :reads], v[:, :, :reads]
    if kv.rotary is not None:
        if not own:
            k = kv.rotary.range(k, 0)
        q = kv.rotary.range(q, position if own else reads - 1)
    return partial_attention(q, k, v, scale=scale)[0]


@functools.lru_cache(maxsize=64)
def _near(first: int, last: int, device: torch.device) -> Tensor:
    """Return the blocks of a window, the same for every layer; of all contexts that take a step together."""
    with torch.inference_mode(False):
        return torch.arange(first, last, device=device)


def attend_gathered(
    q: Tensor,
    kv: LayerKV,
    first: int,
    windows: Tensor,
    index: Tensor,
    valid: Tensor | None,
    scale: float,
    own: bool,
    near: bool,
    kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Gather what each query reads, whatever else is held.

    Arguments and result as for `attend_indexed`; `own`: whether keys are read at their own positions; `kv_heads`: KV
    heads that are held.
    """
    batch, heads, count, dim = q.shape
    chosen = index.shape[-1]
    if near:
        index, valid = _with_window(first, windows, index, valid)
    reads = index.shape[-1]
    index = index.expand(batch, kv_heads, -1, -1)
    k, v = kv.gather(index.reshape(batch, kv_heads, count * reads), rotated=own)
    # Each (KV head, query) is a batch entry of its own, whose queries are the heads of its group.
    rows = batch * kv_heads * count
    k = k.reshape(rows, 1, reads, dim)
    v = v.reshape(rows, 1, reads, -1)
    if kv.rotary is not None:
        if own:
            q = kv.rotary.range(q, first)
        else:
            k = kv.rotary.range(k, 0)
            # The window follows the chosen keys, and the query is its last.
            q = kv.rotary.range(q, chosen + int(windows) - 1) if count == 1 else kv.rotary(q, chosen + windows - 1)
    group = heads // kv_heads
    q = q.reshape(batch * kv_heads, group, count, dim).transpose(1, 2).reshape(rows, 1, group, dim)
    mask = None if valid is None else valid.expand(batch, kv_heads, -1, -1).reshape(rows, 1, 1, reads)
    out, lse = partial_attention(q, k, v, mask, scale=scale)
    out = out.view(batch * kv_heads, count, group, -1).transpose(1, 2).reshape(batch, heads, count, -1)
    return out, lse.view(batch * kv_heads, count, group).transpose(1, 2).reshape(batch, heads, count)


def _with_window(first: int, windows: Tensor, index: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return index and validity with each query's window behind its chosen keys."""
    count, device = windows.shape[0], index.device
    if count == 1:
        tokens = torch.arange(first + 1 - int(windows), first + 1, device=device).view(1, 1, 1, -1)
        held = None
    else:
        at = torch.arange(first, first + count).unsqueeze(1)
        tokens = at - windows.unsqueeze(1) + 1 + torch.arange(int(windows.max()))
        held = (tokens <= at).to(device)
        tokens = torch.minimum(tokens, at).to(device)
    if held is not None or valid is not None:
        known = index.new_ones(index.shape, dtype=torch.bool) if valid is None else valid
        here = tokens.new_ones(tokens.shape, dtype=torch.bool) if held is None else held
        valid = torch.cat([known, here.expand(*index.shape[:-1], -1)], -1)
    return torch.cat([index, tokens.expand(*index.shape[:-1], -1)], -1), valid


def _mask(first: int, windows: Tensor, index: Tensor, valid: Tensor | None, near: bool) -> Tensor:
    """Return which of the keys `0 .. first + T - 1` each query reads: bool `[B or 1, Hkv or 1, T, N]`."""
    count, device = index.shape[2], index.device
    stop = first + count
    mask = torch.zeros(*index.shape[:-1], stop + 1, dtype=torch.bool, device=device)
    # What is not valid goes into a column behind the keys, which is cut off.
    mask.scatter_(-1, index if valid is None else torch.where(valid, index, stop), True)
    mask = mask[..., :stop]
    if near:
        behind = torch.arange(first, stop, device=device).unsqueeze(1) - torch.arange(stop, device=device)
        mask |= (behind >= 0) & (behind < windows.to(device).unsqueeze(1))
    return mask


def _attend_masked(q: Tensor, kv: LayerKV, first: int, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Read every key at its own position under a mask `[B or 1, Hkv or 1, T, N]`."""
    batch, heads, count, dim = q.shape
    stop = first + count
    if kv.rotary is not None:
        q = kv.rotary.range(q, first)
    k = kv.keys_at_own_positions(0, stop)
    v = kv.values(0, stop)
    kv_heads = k.shape[1]
    if mask.shape[1] == 1:
        return partial_attention(q, k, v, mask, scale=scale)
    # Each KV head is a batch entry of its own, so that one mask serves the heads of its group.
    rows = batch * kv_heads
    out, lse = partial_attention(
        q.reshape(rows, heads // kv_heads, count, dim),
        k.reshape(rows, 1, stop, dim),
        v.reshape(rows, 1, stop, -1),
        mask.expand(batch, kv_heads, -1, -1).reshape(rows, 1, count, stop),
        scale=scale,
    )
    return out.reshape(batch, heads, count, -1), lse.reshape(batch, heads, count)
