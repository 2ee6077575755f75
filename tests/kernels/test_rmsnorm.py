"""RMSNorm with the residual's sum: every version against the equation in float64."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.rmsnorm import reference, rmsnorm

pytest.importorskip("triton")
from longspan.kernels.rmsnorm import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (3, 20), (2, 5, 33), (37, 64), (1, 1, 2688), (2, 5000)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def normal(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("wide_residual", [None, False, True])
def test_every_version_equals_the_equation(shape, dtype, wide_residual):
    x, weight = normal(*shape, dtype=dtype, seed=0), 1 + normal(shape[-1], dtype=dtype, seed=1) / 4
    kind = torch.float32 if wide_residual and dtype != torch.float64 else dtype
    residual = None if wide_residual is None else normal(*shape, dtype=kind, seed=2) * 3
    wanted_sum = x.double() if residual is None else x.double() + residual.double()
    wanted = wanted_sum / (wanted_sum.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    versions = [reference.rmsnorm, rmsnorm] + [triton_kernels.rmsnorm] * (dtype != torch.float64)
    for version in versions:
        normed, total = version(x, weight, 1e-5, residual)
        assert normed.dtype == dtype and total.dtype == (dtype if residual is None else kind)
        torch.testing.assert_close(normed.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(total.double(), wanted_sum, atol=TOLERANCE[kind], rtol=TOLERANCE[kind])


def test_what_is_normalised_is_the_rounded_sum():
    x, residual = normal(4, 64, dtype=torch.float16, seed=3), 100 * normal(4, 64, dtype=torch.float16, seed=4)
    weight = torch.ones(64, dtype=torch.float16, device=DEVICE)
    for version in (reference.rmsnorm, triton_kernels.rmsnorm):
        normed, total = version(x, weight, 1e-5, residual)
        torch.testing.assert_close(version(total, weight, 1e-5)[0], normed, atol=0, rtol=0)


def test_rows_may_be_views():
    wide = normal(2, 5, 50, dtype=torch.float32, seed=5)
    x, weight = wide[..., 7:40], normal(33, dtype=torch.float32, seed=6)
    for residual in (wide[..., :33], wide.mT.contiguous().mT[..., 9:42]):
        found = triton_kernels.rmsnorm(x, weight, 1e-6, residual)
        for one, other in zip(found, reference.rmsnorm(x, weight, 1e-6, residual), strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-6)


def test_nothing_is_normalised_to_nothing():
    x = torch.empty(0, 33, device=DEVICE)
    assert triton_kernels.rmsnorm(x, torch.ones(33, device=DEVICE), 1e-6)[0].shape == (0, 33)
