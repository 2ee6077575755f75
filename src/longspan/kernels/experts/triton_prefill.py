"""Experts of many tokens: one product of all rows with the weights of their experts, twice, as a Triton kernel.

Rows stand expert after expert, whole tiles each (`triton_kernels.Layout`), so a tile of the product has one expert and
needs no masks. On Hopper its blocks are brought by the copy engine and the kernel is persistent: every multiprocessor
takes one tile after the other, and the blocks of the next come while the last is written. The first product ends with
the activation. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from longspan.kernels.experts.reference import is_gated
from longspan.kernels.experts.triton_kernels import Layout, gathered, spread
from longspan.kernels.tiles import hopper, roomy

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Cut:
    """How a product is cut.

    Attributes:
        rows: of a tile; the rows of a layout are padded to multiples of it.
        columns: of a tile.
        depth: of a block that is read at once.
        warps: of a program.
        stages: of its loads.
        programs: a multiprocessor, each of which takes tile after tile; 0: one program a tile.
        parted: whether warps have parts of their own (`gluon_kernels`, which knows one tile), where the copy engine
            can be used.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0
    parted: bool = False


PARTED = Cut(128, 256, 64, 8, 4, programs=1, parted=True)
"""The tile of `gluon_kernels`: run as threads and compiled, not on a GPU yet, so that `cuts_for` does not choose it."""


@triton.jit
def activated(b_x, b_other, RELU2: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr):
    """Return the activation of b_x; gated: times b_other."""
    if RELU2:
        b_x = tl.where(b_x < 0.0, 0.0, b_x)  # NaN stays
        b_x = b_x * b_x
    if SILU:
        b_x = b_x * tl.sigmoid(b_x)
    if GATED:
        b_x = b_x * b_other
    return b_x


@triton.jit
def _grouped_kernel(
    p_x, p_w, p_out, p_expert, p_tiles, N, K, s_x, s_expert, s_w,
    RELU2: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
    B_M: tl.constexpr, B_N: tl.constexpr, B_K: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply tiles of rows [B_M, K] with B_N columns of their expert's weights; gated: with as many of both parts.

    By the copy engine (TMA) `p_x` describes the rows, `p_w` weights [E, N, K] (gated [2 E, N, K]), `p_out` the output;
    what lies outside is 0, or not written. Without it columns are masked.
    """
    PARTS: tl.constexpr = 2 if GATED else 1
    columns = tl.cdiv(N, B_N)
    tiles = tl.load(p_tiles) * (PAD // B_M) * columns
    o_m, o_n, o_k = tl.arange(0, B_M), tl.arange(0, B_N), tl.arange(0, B_K)
    o_w = tl.arange(0, PARTS * B_N)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        m, n = i_tile // columns * B_M, i_tile % columns * B_N
        i_expert = tl.load(p_expert + m // PAD)
        if not TMA:
            o_column = n + o_w % B_N
            m_w = (o_column < N)[None, :]
            o_row = (o_column + o_w // B_N * N).to(tl.int64)
            p_ws = p_w + i_expert.to(tl.int64) * s_expert + o_row[None, :] * s_w + o_k[:, None]
            p_xs = p_x + (m + o_m).to(tl.int64)[:, None] * s_x + o_k[None, :]
        b_out = tl.zeros([B_M, PARTS * B_N], tl.float32)
        for k in range(0, K, B_K):
            if TMA:
                b_x = p_x.load([m, k])  # [B_M, B_K]
                b_w = p_w.load([i_expert * PARTS, n, k]).reshape(PARTS * B_N, B_K).T
            else:
                b_x = tl.load(p_xs + k, mask=(k + o_k < K)[None, :], other=0.0)
                b_w = tl.load(p_ws + k, mask=(k + o_k < K)[:, None] & m_w, other=0.0)  # [B_K, PARTS B_N]
            b_out = tl.dot(b_x, b_w, b_out, input_precision=PRECISION)
        if GATED:
            b_one, b_other = b_out.reshape(B_M, 2, B_N).permute(0, 2, 1).split()
            b_out = activated(b_one, b_other, RELU2, SILU, True)
        else:
            b_out = activated(b_out, b_out, RELU2, SILU, False)
        if TMA:
            p_out.store([m, n], b_out.to(p_out.dtype))
        else:
            p_outs = p_out + (m + o_m).to(tl.int64)[:, None] * N + (n + o_n)[None, :]
            tl.store(p_outs, b_out.to(p_out.dtype.element_ty), mask=(n + o_n < N)[None, :])


def product(
    x: Tensor, weight: Tensor, layout: Layout, cut: Cut, *,
    activation: str = "", gated: bool = False, engine: bool | None = None,
) -> Tensor:  # fmt: skip
    """Return the rows times their experts' weights, activated.

    Args:
        x: `[capacity, K]`, rows in the layout's order.
        weight: `[E, N, K]`; gated `[E, 2 N, K]`.
        layout: of the rows.
        cut: how.
        activation: `relu2`, `silu`, or none.
        gated: whether the first half of the columns is activated and multiplied with the second.
        engine: whether Hopper's copy engine brings blocks; None: where it can.

    Returns:
        `[capacity, N]`; rows of padding hold anything.
    """
    outs, depth = weight.shape[1:]
    columns = outs // 2 if gated else outs
    x = x if x.stride(-1) == 1 else x.contiguous()
    assert weight.stride(-1) == 1 and layout.pad % cut.rows == 0
    out = torch.empty(layout.capacity, columns, dtype=x.dtype, device=x.device)
    parts = weight.unflatten(1, (2, columns)) if gated else weight
    able = all(_copied(one) for one in (x, weight, out)) and (not gated or parts.stride(0) == 2 * parts.stride(1))
    engine = (hopper(x.device) if engine is None else engine) and able
    whole = weight.stride(0) == outs * weight.stride(1) and layout.pad == cut.rows
    if engine and cut.parted and whole:
        from longspan.kernels.experts import gluon_kernels

        gluon_kernels.launch(
            x, weight, out, layout.expert, layout.tiles, _multiprocessors(x.device),
            activation=activation, gated=gated, stages=cut.stages,
        )  # fmt: skip
        return out
    p_x, p_w, p_out = x, weight, out
    if engine:
        p_x = _described(x, cut.rows, cut.depth)
        p_w = _described(parts.flatten(0, 1) if gated else weight, 1 + gated, cut.columns, cut.depth)
        p_out = _described(out, cut.rows, cut.columns)
    most = layout.capacity // cut.rows * triton.cdiv(columns, cut.columns)
    programs = min(most, cut.programs * _multiprocessors(x.device)) if cut.programs else most
    _grouped_kernel[(programs,)](
        p_x, p_w, p_out, layout.expert, layout.tiles,
        columns, depth, x.stride(0), weight.stride(0), weight.stride(1),
        RELU2=activation == "relu2", SILU=activation == "silu", GATED=gated, TMA=engine,
        B_M=cut.rows, B_N=cut.columns, B_K=cut.depth, PAD=layout.pad,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "ieee", num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def experts(
    x: Tensor, up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *,
    activation: str = "relu2", shared: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None,
    cuts: tuple[Cut, Cut] | None = None, engine: bool | None = None,
) -> Tensor:  # fmt: skip
    """Sum what experts make of tokens; see `reference.experts`, and beyond it:

    Args:
        x: as there, and so on.
        up: as there.
        down: as there.
        ids: as there.
        weights: as there.
        activation: as there.
        shared: as there; computed by PyTorch's products.
        residual: as there.
        cuts: of the two products; None: as `cuts_for` says.
        engine: whether Hopper's copy engine brings blocks; None: where it can.
    """
    gated, number = is_gated(up, down), up.shape[0]
    first, second = cuts or cuts_for(x.dtype, ids.numel() / number, gated, roomy(x.device))
    layout = Layout.of(ids, number, max(first.rows, second.rows))
    rows = spread(x, layout)
    hidden = product(rows, up, layout, first, activation=activation, gated=gated, engine=engine)
    del rows
    made = product(hidden, down, layout, second, engine=engine)
    del hidden
    base = residual if shared is None else dense(x, *shared, activation, residual)
    return gathered(made, layout, weights, base, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def dense(x: Tensor, up: Tensor, down: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    """Return what one expert makes of all tokens, plus a residual `[T, d]`, by PyTorch's products."""
    gated = up.shape[0] == 2 * down.shape[1]
    hidden = x @ up.T
    inner = down.shape[1]
    out = torch.empty(x.shape[0], inner, dtype=x.dtype, device=x.device) if gated else hidden
    block = 1024
    _activate_kernel[(triton.cdiv(out.numel(), block),)](
        hidden,
        out,
        out.numel(),
        inner,
        RELU2=activation == "relu2",
        SILU=activation == "silu",
        GATED=gated,
        BLOCK=block,
    )
    return out @ down.T if residual is None else torch.addmm(residual, out, down.T)


@triton.jit
def _activate_kernel(
    p_x, p_out, count, inner, RELU2: tl.constexpr, SILU: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_x = o + o // inner * inner if GATED else o
    b_x = tl.load(p_x + o_x, mask=o < count, other=0.0).to(tl.float32)
    b_other = tl.load(p_x + o_x + inner, mask=o < count, other=0.0).to(tl.float32) if GATED else b_x
    tl.store(p_out + o, activated(b_x, b_other, RELU2, SILU, GATED).to(p_out.dtype.element_ty), mask=o < count)


def cuts_for(dtype: torch.dtype, rows: float, gated: bool, roomy: bool) -> tuple[Cut, Cut]:
    """Return the cuts of both products.

    Args:
        dtype: of rows and weights.
        rows: that an expert has in the mean.
        gated: whether the first product has two parts.
        roomy: whether the chip has much shared memory, or little.
    """
    if dtype == torch.float32:
        return (Cut(32, 32, 32, 4, 2),) * 2
    if rows < 24:
        few = Cut(16, 64, 128, 4, 4) if roomy else Cut(16, 64, 64, 4, 3)
        return few, few
    if not roomy:
        return Cut(64, 64, 32, 4, 3), Cut(64, 128, 32, 4, 3)
    wide = Cut(128, 256, 64, 8, 3, programs=1)
    return (Cut(128, 128, 64, 8, 3, programs=1) if gated else wide), wide


def _copied(x: Tensor) -> bool:
    """Return whether the copy engine can bring blocks of x: half numbers, rows aligned."""
    aligned = all(step * x.element_size() % 16 == 0 for step in x.stride()[:-1])
    return x.element_size() == 2 and x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0


def _described(x: Tensor, *block: int) -> TensorDescriptor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
