"""The grouped product for Hopper with warps that have parts of their own, in Triton's lower language, Gluon.

Persistent: every multiprocessor takes tile after tile of 128 rows and 256 columns (gated: 128 of either part). One warp
brings blocks by the copy engine, of the next tile too while the last is written; two groups of four warps multiply 64
rows each, and write them by the engine in parts of 64 columns. Columns that are left beside whole tiles have a tile of
their own width, so that nothing is multiplied in vain.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS, COLUMNS, DEPTH, PART = 128, 256, 64, 64
"""Rows, columns and depth of a tile's block, and columns that are written at once."""

# Other names from Triton 3.9 on.
_bring_rows = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_write_rows = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _bring(
    x_rows, w_rows, w_tail, p_expert, s_x, s_w, full, free, N, K, columns, tiles,
    PARTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Copy every block of every tile into the next free place."""
    STAGES: gl.constexpr = s_w.shape[0]
    WIDE: gl.constexpr = s_w.shape[1]
    B_K: gl.constexpr = s_w.shape[2]
    i = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_m, i_n = i_tile // columns, i_tile % columns
        w = gl.load(p_expert + i_m) * PARTS * N + i_n * (WIDE // PARTS)
        for k in range(0, K, B_K):
            place = i % STAGES
            mbarrier.wait(free.index(place), ((i // STAGES) & 1) ^ 1)
            if TAIL > 0 and i_n == columns - 1:
                mbarrier.expect(full.index(place), (128 + TAIL) * B_K * 2)
                _bring_rows(w_tail, [w, k], full.index(place), s_w.index(place).slice(0, TAIL, 0))
            else:
                mbarrier.expect(full.index(place), (128 + WIDE) * B_K * 2)
                for part in gl.static_range(PARTS):
                    at = s_w.index(place).slice(part * (WIDE // PARTS), WIDE // PARTS, 0)
                    _bring_rows(w_rows, [w + part * N, k], full.index(place), at)
            _bring_rows(x_rows, [i_m * 128, k], full.index(place), s_x.index(2 * place))
            _bring_rows(x_rows, [i_m * 128 + 64, k], full.index(place), s_x.index(2 * place + 1))
            i += 1


@gluon.jit
def _halves(b_x):
    """Return the left and the right half of the columns."""
    return b_x.reshape(b_x.shape[0], 2, b_x.shape[1] // 2).permute(0, 2, 1).split()


@gluon.jit
def _activated(b_x, RELU2: gl.constexpr, SILU: gl.constexpr):
    if RELU2:
        b_x = gl.where(b_x < 0.0, 0.0, b_x)  # NaN stays
        b_x = b_x * b_x
    if SILU:
        b_x = b_x / (1.0 + gl.exp(-b_x))
    return b_x


@gluon.jit
def _write(out_rows, s_out, b_x, m, n, i_half, j):
    """Write the columns in parts of 64, of which the first is this half's j-th.

    Two places take turns: a part's is free once all parts but the last are written.
    """
    WIDE: gl.constexpr = b_x.shape[1]
    if WIDE > 64:
        b_left, b_right = _halves(b_x)
        _write(out_rows, s_out, b_left, m, n, i_half, j)
        _write(out_rows, s_out, b_right, m, n + WIDE // 2, i_half, j + WIDE // 128)
    else:
        tma.store_wait(1)
        place = s_out.index(2 * i_half + j % 2)
        place.store(b_x.to(out_rows.dtype))
        fence_async_shared()
        _write_rows(out_rows, [m, n], place)


@gluon.jit
def _tile(
    out_rows, s_x, s_w, s_out, full, free, i, j, i_half, K, m, n,
    WIDE: gl.constexpr, PARTS: gl.constexpr, RELU2: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """Multiply half of a tile's rows with WIDE columns, from block i on, and write them, from part j on.

    Returns:
        The next tile's first block and part.
    """
    STAGES: gl.constexpr = s_w.shape[0]
    B_K: gl.constexpr = s_w.shape[2]
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    b_out = gl.zeros([64, WIDE], gl.float32, layout=OUT)
    for k in range(0, K, B_K):
        place = i % STAGES
        mbarrier.wait(full.index(place), (i // STAGES) & 1)
        b_w = s_w.index(place).slice(0, WIDE, 0).permute((1, 0))
        b_out = warpgroup_mma(s_x.index(2 * place + i_half), b_w, b_out, is_async=True)
        b_out = warpgroup_mma_wait(1, deps=[b_out])
        if k > 0:
            mbarrier.arrive(free.index((i - 1) % STAGES), count=1)  # of the block before, whose product is there
        i += 1
    b_out = warpgroup_mma_wait(0, deps=[b_out])
    mbarrier.arrive(free.index((i - 1) % STAGES), count=1)
    if PARTS == 2:
        b_one, b_other = _halves(b_out)
        _write(out_rows, s_out, _activated(b_one, RELU2, SILU) * b_other, m, n, i_half, j)
    else:
        _write(out_rows, s_out, _activated(b_out, RELU2, SILU), m, n, i_half, j)
    return i, j + WIDE // PARTS // 64


@gluon.jit
def _multiply(
    out_rows, s_x, s_w, s_out, full, free, N, K, columns, tiles, i_half,
    PARTS: gl.constexpr, TAIL: gl.constexpr, RELU2: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """Multiply half the rows of every tile."""
    WIDE: gl.constexpr = s_w.shape[1]
    i, j = 0, 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_m, i_n = i_tile // columns, i_tile % columns
        m, n = i_m * 128 + i_half * 64, i_n * (WIDE // PARTS)
        if TAIL > 0 and i_n == columns - 1:
            i, j = _tile(out_rows, s_x, s_w, s_out, full, free, i, j, i_half, K, m, n, TAIL, 1, RELU2, SILU)
        else:
            i, j = _tile(out_rows, s_x, s_w, s_out, full, free, i, j, i_half, K, m, n, WIDE, PARTS, RELU2, SILU)
    tma.store_wait(0)


@gluon.jit
def grouped_kernel(
    x_rows, w_rows, w_tail, out_rows, p_expert, p_tiles, N, K,
    PARTS: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, RELU2: gl.constexpr, SILU: gl.constexpr,
):  # fmt: skip
    """Multiply tiles of 128 rows, each of one expert, with N columns of the expert's weights."""
    WIDE: gl.constexpr = 256
    B_K: gl.constexpr = 64
    kind: gl.constexpr = x_rows.dtype
    columns = gl.cdiv(N, WIDE // PARTS)
    tiles = gl.load(p_tiles) * columns
    s_x = gl.allocate_shared_memory(kind, [2 * STAGES, 64, B_K], x_rows.layout)
    s_w = gl.allocate_shared_memory(kind, [STAGES, WIDE, B_K], w_rows.layout)
    s_out = gl.allocate_shared_memory(kind, [4, 64, 64], out_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(free.index(j), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                out_rows, s_x, s_w, s_out, full, free, N, K, columns, tiles, 0,
                PARTS, TAIL, RELU2, SILU,
            )),
            (_multiply, (
                out_rows, s_x, s_w, s_out, full, free, N, K, columns, tiles, 1,
                PARTS, TAIL, RELU2, SILU,
            )),
            (_bring, (x_rows, w_rows, w_tail, p_expert, s_x, s_w, full, free, N, K, columns, tiles, PARTS, TAIL)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def launch(
    x: Tensor, weight: Tensor, out: Tensor, expert: Tensor, tiles: Tensor, programs: int, *,
    activation: str, gated: bool, stages: int = 4,
) -> None:  # fmt: skip
    """Run the kernel.

    Args:
        x: `[capacity, K]` half numbers, rows in the layout's order, that the copy engine can bring.
        weight: `[E, N, K]` without gaps; gated `[E, 2 N, K]`.
        out: `[capacity, N]`, written.
        expert: int32, of each tile of 128 rows.
        tiles: int32 `[1]`, the tiles that there are.
        programs: multiprocessors.
        activation: `relu2`, `silu`, or none.
        gated: whether the first half of the columns is activated and multiplied with the second.
        stages: blocks that may be on their way.
    """
    columns, depth = out.shape[1], x.shape[1]
    left = 0 if gated else columns % COLUMNS
    tail = 0 if left == 0 or left > COLUMNS // 2 else max(PART, 1 << (left - 1).bit_length())
    rows = weight.flatten(0, 1)
    grouped_kernel[(programs,)](
        _described(x, ROWS // 2, DEPTH), _described(rows, COLUMNS // (1 + gated), DEPTH),
        _described(rows, tail or COLUMNS, DEPTH), _described(out, ROWS // 2, PART), expert, tiles, columns, depth,
        PARTS=1 + gated, TAIL=tail, STAGES=stages, RELU2=activation == "relu2", SILU=activation == "silu", num_warps=4,
    )  # fmt: skip


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    kind = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], kind)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
