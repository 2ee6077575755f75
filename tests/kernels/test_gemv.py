"""Every version of a product with few rows against float64."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.gemv import gemv, reference

pytest.importorskip("triton")
from longspan.kernels.gemv import triton_kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 2e-5 if CUDA else 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = [(1, 40, 37), (3, 70, 9), (8, 16, 5), (2, 33, 64)]
if CUDA:
    SIZES += [(1, 2688, 10304), (8, 4096, 2688), (1, 14336, 4096)]


def inputs(rows, depth, outs, dtype):
    generator = torch.Generator().manual_seed(rows * depth)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return normal(rows, depth), normal(outs, depth) / depth**0.5, normal(rows, outs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows,depth,outs", SIZES)
def test_every_version_multiplies(rows, depth, outs, dtype):
    x, weight, residual = inputs(rows, depth, outs, dtype)
    wanted = x.double() @ weight.double().T
    small = triton_kernels.Cut(4, 32 if depth < 100 else 2048, 4)  # more than a few blocks take long to compile
    for found in (
        reference.gemv(x, weight),
        gemv(x, weight),
        triton_kernels.gemv(x, weight),
        triton_kernels.gemv(x, weight, cut=small),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for version in (reference, triton_kernels):
        found = version.gemv(x, weight, residual=residual, out_dtype=torch.float32)
        assert found.dtype == torch.float32, "a half type's sum is rounded once, or not at all"
        torch.testing.assert_close(found.double(), wanted + residual.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        gemv(x, weight, residual=residual).double(), wanted + residual.double(),
        atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype],
    )  # fmt: skip


def test_inputs_may_be_views():
    x, weight, residual = inputs(2, 40, 24, torch.float32)
    wide = torch.stack([x, -x], 1).flatten(0, 1)[::2]  # every second row
    columns = weight.repeat(1, 2)[:, :40]
    turned = residual.T.contiguous().T
    found = triton_kernels.gemv(wide, columns, residual=turned)
    assert torch.equal(found, triton_kernels.gemv(x, weight, residual=residual))


@pytest.mark.parametrize("place", [0, 36])
def test_a_row_of_nan_stays_alone(place):
    x, weight, _ = inputs(2, 40, 37, torch.float32)
    clean = triton_kernels.gemv(x, weight)
    weight[place] = float("nan")
    found = triton_kernels.gemv(x, weight)
    others = torch.arange(37) != place
    assert torch.equal(found[:, others], clean[:, others]) and found[:, place].isnan().all()
