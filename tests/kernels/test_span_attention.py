"""Every version of span attention against the reference, and the reference against a loop over rows."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.kernels.held import Held
from longspan.kernels.span_attention import reference
from longspan.kernels.tiles import hopper, roomy

pytest.importorskip("triton")
from longspan.kernels.span_attention import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(rows=37, keys=150, heads=2, dim=16, value_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, k, v = normal(1, heads, rows, dim), normal(1, heads, keys, dim), normal(1, heads, keys, value_dim)
    lo = torch.randint(0, keys, (1, heads, rows), generator=generator).to(DEVICE)
    hi = (lo + torch.randint(-2, 60, (1, heads, rows), generator=generator).to(DEVICE)).clamp(max=keys - 1)
    return q, k, v, lo, hi


def loop(q, k, v, lo, hi, scale):
    """Each row by itself, in float64; rows of nothing stay 0 and -inf."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float64)
    for h in range(q.shape[1]):
        for r in range(q.shape[2]):
            a, b = int(lo[0, h, r]), int(hi[0, h, r]) + 1
            if a < b:
                scores = k[0, h, a:b].double().cpu() @ q[0, h, r].double().cpu() * scale
                lse[0, h, r] = torch.logsumexp(scores, 0)
                out[0, h, r] = torch.softmax(scores, 0) @ v[0, h, a:b].double().cpu()
    return out, lse


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("sizes", [{}, dict(rows=200, keys=97), dict(rows=1, keys=5), dict(dim=20, value_dim=24)])
def test_every_version_equals_a_loop_over_rows(sizes, dtype, tolerance):
    q, k, v, lo, hi = inputs(dtype=dtype, **sizes)
    scale = 1 / math.sqrt(q.shape[-1])
    wanted, wanted_lse = loop(q, k, v, lo, hi, scale)
    for version in (reference, launch):
        out, lse = version.span_attention(q, k, v, lo, hi, scale=scale)
        torch.testing.assert_close(out.double().cpu(), wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double().cpu(), wanted_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale):
    q, k, v, lo, hi = inputs()
    out, lse = launch.span_attention(q, k, v, lo, hi, scale=scale)
    wanted, wanted_lse = loop(q, k, v, lo, hi, scale)
    torch.testing.assert_close(out.double().cpu(), wanted, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double().cpu(), wanted_lse, atol=2e-6, rtol=2e-6)


def test_keys_and_values_may_be_views():
    q, k, v, lo, hi = inputs()
    wide = torch.stack([k, v], -2)  # [1, H, N, 2, D]: a key's rows are not neighbours
    out, lse = launch.span_attention(q, wide[..., 0, :], wide[..., 1, :], lo, hi, scale=0.25)
    same, same_lse = launch.span_attention(q, k, v, lo, hi, scale=0.25)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_row_does_not_read_never_reaches_it(poison, where):
    q, k, v, lo, hi = inputs()
    clean, clean_lse = launch.span_attention(q, k, v, lo, hi, scale=0.25)
    held = {"k": k, "v": v}[where]
    held[:, :, 70] = poison
    out, lse = launch.span_attention(q, k, v, lo, hi, scale=0.25)
    reads = (lo <= 70) & (hi >= 70)
    assert torch.equal(out[~reads], clean[~reads]) and torch.equal(lse[~reads], clean_lse[~reads])
    assert reads.any()
    if where == "v" or poison != poison:
        assert out[reads].isnan().all()


def test_rows_that_read_nothing_weigh_nothing():
    q, k, v, lo, _ = inputs()
    out, lse = launch.span_attention(q, k, v, lo, lo - 1, scale=0.25)
    assert (out == 0).all() and (lse == float("-inf")).all()


@pytest.mark.parametrize("rows", [200, 300])
def test_what_the_parted_kernel_marks_is_done_anew(rows, monkeypatch):
    """Two marks for each of its tiles: one for half of its rows, 64 in their order."""
    gluon_kernels = pytest.importorskip("longspan.kernels.span_attention.gluon_kernels")
    q, k, v, lo, hi = inputs(rows=rows, dtype=torch.float16)
    tile = launch.forward_tile(q.dtype, 16, roomy(q.device), few=True)
    wanted, _ = launch.span_attention(q, k, v, lo, hi, scale=0.25, out_dtype=q.dtype, tile=tile)
    marks = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]], dtype=torch.int32, device=DEVICE)
    marks = marks[:, : -(-rows // 128) * 2].contiguous()
    orders = []

    def marked(q, k, v, lo, hi, order, out, lse, **options):
        orders.append(order)
        out.fill_(float("nan"))
        return marks

    monkeypatch.setattr(gluon_kernels, "launch", marked)
    out, _ = launch.span_attention(q, k, v, lo, hi, scale=0.25, out_dtype=q.dtype, parted=True)
    anew = marks.repeat_interleave(64, 1)[:, :rows].flatten().bool()
    at = orders[0].flatten()
    assert torch.equal(out.view(-1, 16)[at[anew]], wanted.view(-1, 16)[at[anew]])
    assert out.view(-1, 16)[at[~anew]].isnan().all()


@pytest.mark.skipif(not hopper(torch.device(DEVICE)), reason="warps with parts of their own are Hopper's")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,keys", [(1, 70), (64, 200), (129, 1000), (4097, 4097), (20000, 70001)])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_warps_with_parts_of_their_own_compute_the_same(rows, keys, dim, dtype, paged, poison):
    q, k, v, lo, hi = inputs(rows=rows, keys=-(-keys // 64) * 64, dim=dim, value_dim=dim, dtype=dtype)
    hi = (lo + torch.randint(-2, 900, lo.shape, device=DEVICE)).clamp(max=keys - 1)
    lo, hi = lo.int(), hi.int()
    if poison is not None:
        k[:, :, keys // 3], v[:, :, keys // 2] = poison, poison
        k[:, :, keys:], v[:, :, keys:] = float("nan"), float("nan")
    held = [Held(k), Held(v)]
    if paged:
        slots = torch.randperm(k.shape[2] // 64, device=DEVICE)
        for i, x in enumerate((k, v)):
            pages = torch.empty(2, len(slots), 64, dim, dtype=dtype, device=DEVICE)
            pages[:, slots] = x[0].view(2, -1, 64, dim)
            held[i] = Held(pages, slots.view(1, -1))
    found = [
        launch.span_attention(q, *held, lo, hi, scale=0.1, out_dtype=dtype, beat=beat, parted=parted)
        for beat, parted in ((0, False), (0, True), (0, True), (256, True))
    ]
    (wanted, wanted_lse), *others = found
    for out, lse in others:
        torch.testing.assert_close(out, wanted, atol=1e-2, rtol=1e-2, equal_nan=True)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=1e-3, equal_nan=True)
    assert torch.equal(others[0][0].nan_to_num(7.0), others[1][0].nan_to_num(7.0)), "two runs are equal"
