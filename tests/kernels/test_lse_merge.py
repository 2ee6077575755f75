"""The merge of two parts: every version against the equation in float64, in views, with parts that hold no keys."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels.lse_merge import merge_into, merge_packed, merged, reference

pytest.importorskip("triton")
from longspan.kernels.lse_merge import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 8), (1, 4, 70, 20), (1, 2, 33, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", [merge_into, reference.merge_into, triton_kernels.merge_into])
def test_every_version_equals_the_equation(shape, dtype, version):
    generator = torch.Generator().manual_seed(sum(shape))
    batch, heads, rows, dim = shape
    room = torch.full((batch, heads, rows + 3, dim), float("nan"), device=DEVICE)
    room_lse = torch.full((batch, heads, rows + 3), float("nan"), device=DEVICE)
    out, lse = room[:, :, 2:-1], room_lse[:, :, 2:-1]
    out.copy_(torch.randn(shape, generator=generator))
    lse.copy_(40 * torch.randn(shape[:3], generator=generator))
    part = torch.randn(batch, rows, heads, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    part_lse = (40 * torch.randn(shape[:3], generator=generator)).to(DEVICE)
    if rows > 4:
        lse[:, :, 0] = -INF
        out[:, :, 0] = float("nan")
        part_lse[:, :, 1] = -INF
        part[:, :, 1] = float("nan")
        lse[:, :, 2] = part_lse[:, :, 2] = -INF
        lse[:, :, 3] = part_lse[:, :, 3]
    weights = torch.stack([lse, part_lse]).double()
    total = torch.logsumexp(weights, 0)
    weights = torch.exp(weights - total.masked_fill(total == -INF, 0.0)).unsqueeze(-1)
    sides = torch.stack([out.double(), part.double()])
    wanted = torch.where(weights == 0, 0.0, weights * sides).sum(0)
    version(out, lse, part, part_lse)
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), total, atol=2e-6, rtol=2e-6)
    assert bool(room[:, :, :2].isnan().all()) and bool(room_lse[:, :, -1:].isnan().all()), "only the view is written"


def test_a_merge_is_the_same_in_either_order():
    torch.manual_seed(0)
    a, b, a_lse, b_lse = torch.randn(3, 50, 8), torch.randn(3, 50, 8), torch.randn(3, 50), torch.randn(3, 50)
    for x, y in zip(merged(a, a_lse, b, b_lse), merged(b, b_lse, a, a_lse), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("version", [reference.merge_into, triton_kernels.merge_into])
def test_nan_that_is_attended_to_shows(version):
    out, lse = torch.zeros(1, 1, 2, 4, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    part, part_lse = torch.ones_like(out), torch.zeros_like(lse)
    part[0, 0, 0, 1], part_lse[0, 0, 1] = float("nan"), float("nan")
    version(out, lse, part, part_lse)
    assert out.isnan().tolist() == [[[[False, True, False, False], [True] * 4]]] and lse.isnan().tolist() == [
        [[False, True]]
    ]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 32, 128), (3, 2, 5, 7, 20), (8, 130, 64), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("version", [merge_packed, reference.merge_packed, triton_kernels.merge_packed])
def test_all_ranks_parts_at_once(shape, version):
    generator = torch.Generator().manual_seed(sum(shape))
    outs, lses = torch.randn(shape, generator=generator), 4 * torch.randn(shape[:-1], generator=generator)
    if lses[0].numel() > 4:
        flat_outs, flat_lses = outs.view(shape[0], -1, shape[-1]), lses.view(shape[0], -1)
        flat_lses[0, 0], flat_outs[0, 0] = -INF, float("nan")
        flat_lses[:, 1], flat_outs[:, 1] = -INF, INF
        flat_lses[:, 2] = 3.0
    packed = torch.cat([outs, lses.unsqueeze(-1)], -1).to(DEVICE)
    total = torch.logsumexp(lses.double(), 0)
    weights = torch.exp(lses.double() - total.masked_fill(total == -INF, 0.0)).unsqueeze(-1)
    wanted = torch.where(weights == 0, 0.0, weights * outs.double()).sum(0)
    out, lse = version(packed)
    torch.testing.assert_close(out.double().cpu(), wanted, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double().cpu(), total, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("version", [reference.merge_packed, triton_kernels.merge_packed])
def test_nan_of_a_rank_shows(version):
    packed = torch.zeros(2, 3, 5, device=DEVICE)
    packed[1, 0, 2], packed[0, 1, 4] = float("nan"), float("nan")
    out, lse = version(packed)
    assert out[0].isnan().tolist() == [False, False, True, False]
    assert bool(out[1].isnan().all()) and bool(lse[1].isnan()) and not bool(out[2].isnan().any())
