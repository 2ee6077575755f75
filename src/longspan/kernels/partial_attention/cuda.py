"""Attention over a part of the keys through PyTorch's fused GPU kernels, which never write the scores out.

PyTorch's public `scaled_dot_product_attention` returns no log-sum-exp; the operators beneath it do. FlashAttention-2
(arXiv 2307.08691) serves half types without a mask, the memory-efficient kernel (arXiv 2112.05682, in CUTLASS) float32
and masks. Keys and values that are held in a half type stay so: queries are rounded to it (they came from a model in
it), sums are float32. Few queries in float32 go to the reference: a kernel that walks the keys in one block is slower
there than two products, whose scores are small.
Masked values that are not finite would reach its output (0 * NaN), so such inputs go to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.kernels.partial_attention.reference import partial_attention as reference

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
_EFFICIENT = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)

_HALVES = (torch.bfloat16, torch.float16)
_ALIGNED = 8
"""Elements that a head's size, and a row of a mask, must be a multiple of: 16 bytes in a half type."""
_MOST_DIM = 256
"""Largest head of FlashAttention."""
_FEW = 64
"""Queries of one KV head in float32 that go to the reference."""


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether this version computes what the reference would for these inputs (types, shapes, device)."""
    grouped = q.shape[1] // k.shape[1] * q.shape[2]
    return (
        _FLASH is not None
        and _EFFICIENT is not None
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and _fits(q, k, v)
        and (k.dtype in _HALVES or grouped > _FEW)
        and not torch.is_grad_enabled()
    )


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels take inputs of these types and shapes."""
    return (
        q.dtype == torch.float32
        and k.dtype == v.dtype
        and k.dtype in (torch.float32, *_HALVES)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % _ALIGNED == 0
        and q.shape[-1] <= _MOST_DIM
        and k.shape[2] > 0
        and q.shape[2] > 0
        and k.stride(-1) == v.stride(-1) == 1
    )


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q to one part of the keys; arguments and results as in the reference."""
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    group, rows = heads // kv_heads, batch * kv_heads
    if mask is None:
        # Without a mask the queries of one group are just more queries of their KV head: no copy of the keys.
        grouped = q.to(k.dtype).reshape(batch, kv_heads, group * queries, dim)
        out, lse = _flash(grouped, k, v, scale) if k.dtype in _HALVES else _efficient(grouped, k, v, None, scale)
        return out.to(q.dtype).reshape(batch, heads, queries, dim), lse.reshape(batch, heads, queries)
    # One pass a tensor: a finite sum has only finite terms, and one that overflows merely takes the slower way.
    if not torch.isfinite(k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)):
        return reference(q, k, v, mask, scale=scale)
    mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
    mask = mask.expand(batch, -1, -1, k.shape[2])
    # A KV head is a batch entry whose keys its query heads share, so that no key is copied.
    if mask.shape[1] == heads:
        own = mask.reshape(rows, group, *mask.shape[2:])
    else:
        own = mask if batch == 1 else mask.repeat_interleave(kv_heads, 0)
    bias = _bias(own, k.dtype).expand(rows, group, queries, -1)
    grouped = q.to(k.dtype).reshape(rows, group, queries, dim)
    k, v = (x.reshape(rows, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    out, lse = _efficient(grouped, k, v, bias, scale)
    out, lse = out.to(q.dtype).reshape(batch, heads, queries, dim), lse.reshape(batch, heads, queries)
    # What the kernel leaves in rows that attend to nothing is not ours to rely on.
    nothing = ~mask.any(-1).expand(batch, heads, queries)
    return out.masked_fill(nothing.unsqueeze(-1), 0.0), lse.masked_fill(nothing, float("-inf"))


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with q, k and v of one half type, without a mask."""
    assert _FLASH is not None, "serves() was not asked"
    out, lse = _FLASH(q, k, v, 0.0, False, scale=scale)[:2]
    return out, lse


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with q, k and v of one type; `bias` is added to the scores."""
    assert _EFFICIENT is not None, "serves() was not asked"
    out, lse = _EFFICIENT(q, k, v, bias, True, 0.0, False, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]  # the kernel fills its last block of 32 queries


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask `[..., N]` adds to scores; as the kernel wants it, rows begin at multiples of 16 bytes."""
    keys = mask.shape[-1]
    filled = torch.zeros(*mask.shape[:-1], -(-keys // _ALIGNED) * _ALIGNED, dtype=dtype, device=mask.device)
    return filled[..., :keys].masked_fill_(~mask, float("-inf"))
