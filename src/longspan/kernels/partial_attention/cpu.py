"""Attention over a part of the keys through PyTorch's blocked CPU kernel, faster than the plain version.

PyTorch's public `scaled_dot_product_attention` returns no log-sum-exp; the operator beneath it does. It serves float32
on the CPU. Keys and values that are held in bfloat16 stay so where the CPU multiplies bfloat16 natively: queries are
rounded to it (they came from a model in bfloat16), sums are float32; elsewhere they are widened to float32.
Masked values that are not finite would reach its output (0 * NaN), so such inputs go to the reference.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longspan.kernels.partial_attention.reference import partial_attention as reference

_PADDED = (1, 3)
"""Queries of a KV head that one more makes faster: 1, 2, 3, 4 of them take 2.7, 0.8, 1.1, 0.9 ms to read 8000 keys of
three heads in bfloat16 (EPYC, one thread)."""
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether this version computes what the reference would for these inputs (types, shapes, device)."""
    return (
        _FLASH is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and k.dtype == v.dtype
        and k.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1]
        and k.shape[2] > 0
        and q.shape[2] > 0
        and not torch.is_grad_enabled()
    )


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q to one part of the keys; arguments and results as in the reference."""
    assert _FLASH is not None, "serves() was not asked"
    if k.dtype == torch.bfloat16 and multiplies_bfloat16():
        out, lse = _attend(q.to(k.dtype), k, v, mask, scale)
        return out.to(q.dtype), lse.to(q.dtype)
    return _attend(q, k.to(q.dtype), v.to(q.dtype), mask, scale)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 by instructions of its own."""
    return bool(
        getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with q, k and v of one type."""
    assert _FLASH is not None, "serves() was not asked"
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    if mask is None:
        # Without a mask the queries of one group are just more queries of their KV head: no copy of the keys.
        rows = heads // kv_heads * queries
        grouped = q.reshape(batch, kv_heads, rows, dim)
        if rows in _PADDED:
            grouped = torch.constant_pad_nd(grouped, (0, 0, 0, 1))
        out, lse = _FLASH(grouped, k, v, 0.0, False, scale=scale)
        out, lse = out[:, :, :rows], _rows(lse, grouped)[:, :, :rows]
        return out.reshape(batch, heads, queries, -1), lse.reshape(batch, heads, queries)
    # One pass a tensor: a finite sum has only finite terms, and one that overflows merely takes the slower way.
    if not torch.isfinite(k.sum() + v.sum()):
        return reference(q, k, v, mask, scale=scale)
    group, rows = heads // kv_heads, batch * kv_heads
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    bias = bias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
    # A KV head is a batch entry whose keys its query heads share, so that no key is copied.
    own = bias.shape[1] == heads
    spread = bias.expand(batch, heads if own else 1, -1, -1)
    if own:
        spread = spread.reshape(rows, group, *spread.shape[2:])
    else:
        spread = spread.unsqueeze(1).expand(-1, kv_heads, -1, -1, -1).reshape(rows, 1, *spread.shape[2:])
    grouped = q.reshape(rows, group, queries, dim)
    shared = (x.reshape(rows, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    out, lse = _FLASH(grouped, *shared, 0.0, False, attn_mask=spread, scale=scale)
    out, lse = out.reshape(batch, heads, queries, -1), _rows(lse, grouped).reshape(batch, heads, queries)
    # The kernel leaves NaN in rows that attend to nothing.
    nothing = ~mask.any(-1).view(bias.shape[:-1]).expand(batch, heads, queries)
    return out.masked_fill(nothing.unsqueeze(-1), 0.0), lse.masked_fill(nothing, float("-inf"))


def _rows(lse: Tensor, q: Tensor) -> Tensor:
    """Return the log-sum-exp as `[B, H, T]`: releases of PyTorch differ in the order of the last two axes."""
    return lse if tuple(lse.shape) == tuple(q.shape[:3]) else lse.transpose(1, 2)
