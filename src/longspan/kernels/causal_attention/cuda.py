"""Causal attention of a context's newest tokens to all of it, by PyTorch's fused GPU kernels.

A chunk attends to all keys before it without a mask, and to itself with one; the two are merged by their log-sum-exp:
cuDNN's causal mask (the fastest on Hopper) and FlashAttention's without GQA are aligned to the oldest key only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CUDNN = getattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", None)
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", None)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether this version serves queries `[B, Hq, T, D]` and keys and values of these types and sizes."""
    return (
        q.is_cuda
        and _FLASH is not None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attend with q, k and v of one half type; arguments and results as in `reference.causal_attention`."""
    first = k.shape[2] - q.shape[2]
    near, near_lse = part(q, k[:, :, first:], v[:, :, first:], scale, causal=True)
    if not first:
        return near
    far, far_lse = part(q, k[:, :, :first], v[:, :, :first], scale, causal=False)
    # In float32: a chunk's first queries have few keys of their own, whose values are large.
    share = torch.sigmoid(near_lse - far_lse).unsqueeze(-1)
    return torch.lerp(far.float(), near.float(), share).to(q.dtype)


def part(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp `[B, Hq, T]` of attention to these keys, N being T where it is causal."""
    if _CUDNN is not None and torch.cuda.get_device_capability(q.device)[0] >= 9:
        out, lse, *_ = _CUDNN(q, k, v, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=causal, scale=scale)
        return out, lse.view(q.shape[:3])
    assert _FLASH is not None, "serves() was not asked"
    group = q.shape[1] // k.shape[1]
    if causal:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # of a chunk alone
        out, lse = _FLASH(q, k, v, 0.0, True, scale=scale)[:2]
        return out, lse
    grouped = q.reshape(q.shape[0], k.shape[1], group * q.shape[2], q.shape[3])
    out, lse = _FLASH(grouped, k, v, 0.0, False, scale=scale)[:2]
    return out.view(q.shape), lse.view(q.shape[:3])


def part_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of these keys in the gradients of q, k and v, by FlashAttention's kernel.

    `out` and `lse` are over all keys, of which these are a part; what is returned has the shapes and types of q, k, v.
    """
    assert _FLASH_BACKWARD is not None, "serves() was not asked"
    batch, kv_heads, keys, dim = k.shape
    group = q.shape[1] // kv_heads
    # The kernel's own handling of groups has changed between releases of PyTorch: keys of this part are spread out.
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout's random numbers
    lse = lse.contiguous()  # it reads the log-sum-exps of a part of the rows as if they were all there are
    dq, dk, dv = _FLASH_BACKWARD(
        grad, q, wide_k, wide_v, out, lse, None, None, q.shape[2], keys, 0.0, causal, unused, unused[0], scale=scale
    )
    return dq, *(x.view(batch, kv_heads, group, keys, dim).sum(2) for x in (dk, dv))
