"""Every version of span attention against the reference, and the reference against a loop over rows."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.kernels.span_attention import reference

pytest.importorskip("triton")
from longspan.kernels.span_attention import triton_kernels

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
    for version in (reference, triton_kernels):
        out, lse = version.span_attention(q, k, v, lo, hi, scale=scale)
        torch.testing.assert_close(out.double().cpu(), wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double().cpu(), wanted_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale):
    q, k, v, lo, hi = inputs()
    out, lse = triton_kernels.span_attention(q, k, v, lo, hi, scale=scale)
    wanted, wanted_lse = loop(q, k, v, lo, hi, scale)
    torch.testing.assert_close(out.double().cpu(), wanted, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double().cpu(), wanted_lse, atol=2e-6, rtol=2e-6)


def test_keys_and_values_may_be_views():
    q, k, v, lo, hi = inputs()
    wide = torch.stack([k, v], -2)  # [1, H, N, 2, D]: a key's rows are not neighbours
    out, lse = triton_kernels.span_attention(q, wide[..., 0, :], wide[..., 1, :], lo, hi, scale=0.25)
    same, same_lse = triton_kernels.span_attention(q, k, v, lo, hi, scale=0.25)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_row_does_not_read_never_reaches_it(poison, where):
    q, k, v, lo, hi = inputs()
    clean, clean_lse = triton_kernels.span_attention(q, k, v, lo, hi, scale=0.25)
    held = {"k": k, "v": v}[where]
    held[:, :, 70] = poison
    out, lse = triton_kernels.span_attention(q, k, v, lo, hi, scale=0.25)
    reads = (lo <= 70) & (hi >= 70)
    assert torch.equal(out[~reads], clean[~reads]) and torch.equal(lse[~reads], clean_lse[~reads])
    assert reads.any()
    if where == "v" or poison != poison:
        assert out[reads].isnan().all()


def test_rows_that_read_nothing_weigh_nothing():
    q, k, v, lo, _ = inputs()
    out, lse = triton_kernels.span_attention(q, k, v, lo, lo - 1, scale=0.25)
    assert (out == 0).all() and (lse == float("-inf")).all()
