"""Every version of window attention against a loop over queries."""

from __future__ import annotations

import math

import pytest
import torch

from longspan.kernels.engine import can_copy
from longspan.kernels.tiles import Tile
from longspan.kernels.window_attention import reference, window_attention

pytest.importorskip("triton")
from longspan.kernels.window_attention import spans, triton_kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = None if CUDA else Tile(32, 16, 4, 2)
"""The interpreter's time goes by blocks: small ones have whole blocks and edges at small sizes."""
SIZES = [
    # batch, KV heads, group, queries, keys, window, dim, value dim
    (1, 1, 1, 1, 1, 1, 16, 16),
    (1, 2, 16, 1, 140, 60, 16, 16),
    (2, 1, 3, 37, 150, 60, 16, 16),
    (1, 1, 1, 90, 90, 41, 16, 16),
    (1, 2, 3, 63, 63, 4, 20, 24),
    (1, 1, 16, 20, 100, 1000, 32, 16),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter's bfloat16 dot is wrong
if CUDA:
    SIZES += [
        (1, 2, 16, 63, 4097, 2024, 128, 128),
        (1, 1, 3, 4097, 4097, 1500, 64, 64),
        (1, 1, 2, 200, 700, 90, 256, 256),
    ]


def inputs(batch, kv_heads, group, queries, keys, dim, value_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    q = normal(batch, kv_heads * group, queries, dim)
    return q, normal(batch, kv_heads, keys, dim), normal(batch, kv_heads, keys, value_dim)


def loop(q, k, v, window, scale):
    """One query of one head after another, in float64."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    batch, heads, count, _ = q.shape
    out = torch.full((*q.shape[:3], v.shape[-1]), float("nan"), dtype=torch.float64)
    lse = torch.full(q.shape[:3], float("nan"), dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, count))).tolist():
        t, one = k.shape[2] - count + i, h // (heads // k.shape[1])
        seen = slice(max(0, t - window + 1), t + 1)
        scores = k[b, one, seen] @ q[b, h, i] * scale
        lse[b, h, i] = torch.logsumexp(scores, 0)
        out[b, h, i] = torch.softmax(scores, 0) @ v[b, one, seen]
    return out, lse


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_every_version_equals_a_loop_over_queries(size, dtype):
    batch, kv_heads, group, queries, keys, window, dim, value_dim = size
    q, k, v = inputs(batch, kv_heads, group, queries, keys, dim, value_dim, dtype)
    scale = 1 / math.sqrt(dim)
    wanted = loop(q, k, v, window, scale)
    close(reference.window_attention(q, k, v, window=window, scale=scale), wanted, TOLERANCE[dtype])
    close(window_attention(q, k, v, window=window, scale=scale), wanted, TOLERANCE[dtype])
    if dtype != torch.float64:
        for tile in {SMALL, None} if queries < 10 else {SMALL}:
            found = triton_kernels.window_attention(q, k, v, window=window, scale=scale, tile=tile)
            close(found, wanted, TOLERANCE[dtype])
            again = triton_kernels.window_attention(q, k, v, window=window, scale=scale, tile=tile)
            assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("size", SIZES[1:5], ids=str)
def test_a_window_as_spans(size):
    batch, kv_heads, group, queries, keys, window, dim, value_dim = size
    q, k, v = inputs(batch, kv_heads, group, queries, keys, dim, value_dim, torch.float32)
    found = spans.window_attention(q, k, v, window=window, scale=0.3, out_dtype=torch.float32)
    close(found, loop(q, k, v, window, 0.3), TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", [SIZES[1], (2, 2, 3, 21, 90, 40, 16, 16)], ids=str)
@pytest.mark.parametrize("poison", [None, float("nan")])
def test_the_copy_engine_brings_the_same(size, poison):
    batch, kv_heads, group, queries, keys, window, dim, value_dim = size
    q, k, v = inputs(batch, kv_heads, group, queries, keys, dim, value_dim, torch.float16)
    if poison is not None:
        v[:, :, keys - 3] = poison
    assert can_copy(k) and can_copy(v) and not can_copy(k.mT) and not can_copy(k.float())
    given = dict(window=window, scale=0.25, tile=SMALL)
    found = triton_kernels.window_attention(q, k, v, engine=True, **given)
    wanted = triton_kernels.window_attention(q, k, v, engine=False, **given)
    # Tiles that meet NaN, be it another head's, are computed in another order.
    exactly = 0.0 if poison is None else TOLERANCE[torch.float16]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=exactly, rtol=exactly, equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(scale):
    q, k, v = inputs(1, 1, 3, 21, 60, 16, 16, torch.float32)
    found = triton_kernels.window_attention(q, k, v, window=33, scale=scale, tile=SMALL)
    close(found, loop(q, k, v, 33, scale), 2e-6)


def test_inputs_may_be_views_and_the_output_of_a_chosen_type():
    q, k, v = inputs(2, 2, 3, 21, 60, 16, 16, torch.float16)
    whole = triton_kernels.window_attention(q, k, v, window=33, scale=0.25, tile=SMALL)
    wide = torch.stack([k, v], -2).transpose(1, 2).contiguous().transpose(1, 2)  # heads of a token are neighbours
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = triton_kernels.window_attention(
        turned, wide[..., 0, :], wide[..., 1, :], window=33, scale=0.25, out_dtype=torch.float16, tile=SMALL
    )
    assert found[0].dtype == torch.float16
    assert torch.equal(found[0], whole[0].half()) and torch.equal(found[1], whole[1])


@pytest.mark.parametrize("version", [reference, triton_kernels])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["k", "v"])
def test_what_a_query_does_not_see_never_reaches_it(version, poison, where):
    q, k, v = inputs(1, 1, 3, 40, 70, 16, 16, torch.float32)
    cut = {} if version is reference else {"tile": SMALL}
    clean, clean_lse = version.window_attention(q, k, v, window=25, scale=0.25, **cut)
    {"k": k, "v": v}[where][:, :, 50] = poison
    out, lse = version.window_attention(q, k, v, window=25, scale=0.25, **cut)
    at = torch.arange(30, 70, device=DEVICE)
    sees = (at >= 50) & (at < 75)
    assert torch.equal(out[:, :, ~sees], clean[:, :, ~sees]) and torch.equal(lse[:, :, ~sees], clean_lse[:, :, ~sees])
    if where == "v" or poison != poison:
        assert not out[:, :, sees].isfinite().all(-1).any()
