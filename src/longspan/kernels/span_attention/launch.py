"""Span attention on a GPU: which kernel serves, how it is cut, and its call.

`triton_kernels.py` serves everywhere; `gluon_kernels.py`, with warps that have parts of their own, on Hopper, where
keys and values are alike and dense. What that one leaves aside (outputs that are not finite) the other does anew.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from longspan.kernels.engine import can_copy, described
from longspan.kernels.held import MIXED, PAGE, PAGES, TENSOR, Held
from longspan.kernels.span_attention import triton_kernels
from longspan.kernels.tiles import Tile, hopper, roomy

LOG2_E = math.log2(math.e)
_MARKS = 64
"""Tiles whose marks one program looks at."""


def span_attention(
    q: Tensor, k: Tensor | Held, v: Tensor | Held, lo: Tensor, hi: Tensor, *, scale: float,
    order: Tensor | None = None, out_dtype: torch.dtype = torch.float32, tile: Tile | None = None,
    engine: bool | None = None, beat: int = 0, parted: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from every row to the keys `lo .. hi`; arguments and results as in the reference, and beyond it:

    Args:
        q: `[B, H, R, D]`, or `[B, H, R / s, D]` where s neighbouring rows share one.
        k: a tensor (maybe a view with strides of its own), or pages.
        v: the same.
        lo: int32 or int64 `[B, H, R]`.
        hi: the same.
        scale: as in the reference.
        order: int64 `[B * H, R]`: the rows of each KV head, numbered through all of them, in an order in which
            neighbours read nearly the same keys and those that read nothing come last; None: found here.
        out_dtype: of the outputs.
        tile: how the kernel is cut; None: as `forward_tile` says.
        engine: whether Hopper's copy engine brings blocks of keys (TMA); None: where it can.
        beat: about as many keys as most spans have, where rows are so few that the spans of tiles that run at the same
            time are more than a GPU's cache holds; 0: no matter.
        parted: whether warps have parts of their own (`gluon_kernels.py`); None: where that kernel serves, and neither
            tile nor engine is given.
    """
    k = k if isinstance(k, Held) else Held(k if k.stride(-1) == 1 else k.contiguous())
    v = v if isinstance(v, Held) else Held(v if v.stride(-1) == 1 else v.contiguous())
    batch, heads, rows = lo.shape
    dim, value_dim = q.shape[-1], v.dim
    if scale <= 0:
        q, scale = q * scale, 1.0  # the kernel takes the greatest product for the greatest score
    out = torch.empty(batch, heads, rows, value_dim, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    if order is None:
        order = torch.argsort(torch.where(lo <= hi, lo, torch.iinfo(lo.dtype).max), dim=-1).view(batch * heads, rows)
        order = order + torch.arange(batch * heads, device=q.device).unsqueeze(1) * rows
    q, lo, hi = q.to(k.rows.dtype).contiguous(), lo.contiguous(), hi.contiguous()
    if parted is None:
        parted = tile is None and engine is None and parts(q, k, v, rows, out_dtype)
    few = parted or beat > 0 or max(k.kind, v.kind) != TENSOR
    tile = tile or forward_tile(q.dtype, max(dim, value_dim), roomy(q.device), few)
    engine = (hopper(q.device) if engine is None else engine) and all(_can_copy(held, tile.keys) for held in (k, v))
    k_rows, k_table, k_codes, k_scales, *k_strides = k.arguments()
    v_rows, v_table, v_codes, v_scales, *v_strides = v.arguments()
    if engine:
        k_codes, v_codes = described(k.rows, tile.keys), described(v.rows, tile.keys)
    arguments = (
        q, k_rows, k_table, k_codes, k_scales, v_rows, v_table, v_codes, v_scales,
        lo, hi, order, out, lse, *k_strides, *v_strides, rows, heads, beat or 1, scale * LOG2_E,
    )  # fmt: skip
    options: dict[str, Any] = {
        "D": dim, "DV": value_dim,
        "B_D": max(16, triton.next_power_of_2(dim)), "B_DV": max(16, triton.next_power_of_2(value_dim)),
        "BLOCK_R": tile.rows, "BLOCK_N": tile.keys, "SHARE": rows // q.shape[2],
        "K_KIND": k.kind, "V_KIND": v.kind, "SHIFT": v.shift,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee",
        # Few rows lie far apart: blocks that none of them reads are then passed over.
        "SPARSE": rows // tile.rows * 8192 < k.capacity, "TMA": engine, "TURNED": beat > 0,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tiles = triton.cdiv(rows, tile.rows)
    if not parted:
        triton_kernels._span_attention_kernel[(tiles, batch * heads)](*arguments, **options)
        return out, lse
    from longspan.kernels.span_attention import gluon_kernels

    assert tile.rows * 2 == gluon_kernels.ROWS, "a mark is for half of a tile there"
    marked = gluon_kernels.launch(q, k, v, lo.int(), hi.int(), order, out, lse, scale=scale * LOG2_E, beat=beat)
    triton_kernels._marked_tiles_kernel[(triton.cdiv(tiles, _MARKS), batch * heads)](
        marked, tiles, *arguments, B_M=_MARKS, **options
    )
    return out, lse


def parts(q: Tensor, k: Held, v: Held, rows: int, out_dtype: torch.dtype) -> bool:
    """Return whether the kernel with warps that have parts of their own serves.

    Args:
        q: queries, wherever they lie together.
        k: keys.
        v: values.
        rows: of a KV head.
        out_dtype: of the outputs.
    """
    if not hopper(q.device) or not gluon_serves():
        return False
    from longspan.kernels.span_attention import gluon_kernels

    alike = k.kind == v.kind != MIXED and k.dim == v.dim in (64, 128) and out_dtype == q.dtype
    # Where rows are few, most blocks between a tile's first and last key are nobody's: the other kernel passes over.
    dense = rows // gluon_kernels.ROWS * 8192 >= k.capacity
    return alike and dense and all(_can_copy(held, gluon_kernels.keys_of(held)) for held in (k, v))


@cache
def gluon_serves() -> bool:
    """Return whether Triton has the lower language, in a version that the kernel was compiled with."""
    return bool(triton.__version__.startswith(("3.6.", "3.9.")))


def forward_tile(dtype: torch.dtype, dim: int, roomy: bool, few: bool = False) -> Tile:
    """Return the tile for keys of this type and head size.

    Args:
        dtype: of keys and values.
        dim: head size.
        roomy: whether the chip has much shared memory, or little.
        few: whether two small programs beside each other serve better than one: where pages are looked up, which holds
            copies back, and where rows are so few that a tile of twice the rows reads keys that few of them want.
    """
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1) if dim > 128 else Tile(32, 16, 4, 2)
    if dim > 128:
        return Tile(128, 32, 8, 2) if roomy else Tile(64, 32, 8, 2)
    return Tile(128, 64, 8, 3) if roomy and not few else Tile(64, 64, 4, 2)


def _can_copy(held: Held, keys: int) -> bool:
    """Return whether the copy engine can bring blocks of `keys` rows."""
    if held.kind == MIXED or not can_copy(held.rows):
        return False
    return held.kind != PAGES or (keys <= PAGE and held.rows.stride(1) == PAGE * held.rows.stride(2))
