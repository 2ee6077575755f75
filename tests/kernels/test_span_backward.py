"""Gradients of spans, windows and anchors' scores: references against autograd, kernels against references."""

from __future__ import annotations

import pytest
import torch

from longspan.kernels import anchor_scores, span_attention, window_attention
from longspan.kernels.anchor_scores import reference as anchor_reference
from longspan.kernels.span_attention import backward as reference
from longspan.kernels.span_attention import order as span_order
from longspan.kernels.span_attention.order import SpanOrder
from longspan.kernels.tiles import Tile
from longspan.kernels.window_attention import reference as window_reference

pytest.importorskip("triton")
from longspan.kernels.anchor_scores import triton_kernels as anchor_kernels
from longspan.kernels.span_attention import triton_backward

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SMALL = (Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
SIZES = [
    # batch, KV heads, group, queries, keys, dim, value dim, spans
    (1, 1, 1, 1, 1, 16, 16, 1),
    (1, 2, 3, 1, 90, 16, 16, 2),
    (2, 1, 3, 11, 60, 16, 24, 3),
    (1, 1, 16, 3, 50, 20, 16, 2),
    (1, 1, 1, 63, 63, 16, 16, 1),
]
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter's bfloat16 dot is wrong
# Three TF32 products keep a few bits less than float32's: on an H100 1.2e-5 was the most among these sizes.
TOLERANCE = {torch.float32: 2e-5 if DEVICE == "cuda" else 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Greatest error over the greatest gradient of the kind; weights and their gradients are rounded to the type."""
if CUDA:
    SIZES += [
        (1, 2, 16, 1, 40000, 128, 128, 3),
        (1, 2, 16, 63, 4097, 128, 128, 3),
        (1, 1, 3, 4097, 4097, 64, 64, 2),
        (1, 2, 2, 300, 700, 256, 256, 2),
        (2, 1, 4, 257, 1000, 80, 128, 3),
    ]


def inputs(size, dtype, seed=0, requires_grad=False):
    batch, kv_heads, group, queries, keys, dim, value_dim, spans = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
        return drawn.requires_grad_(requires_grad)

    q, do = normal(batch, kv_heads * group, queries, dim), normal(batch, kv_heads * group, queries, value_dim)
    k, v = normal(batch, kv_heads, keys, dim), normal(batch, kv_heads, keys, value_dim)
    shape = (batch, kv_heads * group, queries, spans)
    lo = torch.randint(0, keys, shape, generator=generator)
    hi = (lo + torch.randint(-2, max(2, keys // 3), shape, generator=generator)).clamp(max=keys - 1)
    if queries > 2:
        hi[:, :, 1] = -1  # a query that reads nothing
    return q, k, v, do.detach(), lo.to(DEVICE), hi.to(DEVICE)


def plainly(q, k, v, lo, hi, scale):
    """One softmax over all keys of all spans, a key as often as spans have it; no span at all: 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    at = torch.arange(k.shape[2], device=k.device)
    count = ((at >= lo.unsqueeze(-1)) & (at <= hi.unsqueeze(-1))).sum(3)
    weights = torch.exp(q @ k.mT * scale) * count
    total = weights.sum(-1, keepdim=True)
    out = weights @ v / total.clamp(min=1e-300)
    return out, torch.log(total.squeeze(-1))


def merged(q, k, v, do, lo, hi, scale):
    """What the backward pass is given: log-sum-exp and delta of one softmax over all spans."""
    out, lse = plainly(*(x.detach().double() for x in (q, k, v)), lo, hi, scale)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    delta = (out * do.double()).sum(-1)
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (x.to(kind).unsqueeze(-1).expand(lo.shape) for x in (lse, delta))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: _spoilt(empty(*size, **options)))


def _spoilt(x):
    return x.fill_(float("nan")) if x.is_floating_point() else x


def near(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        greatest = max(float(other.abs().max()), 1.0)
        torch.testing.assert_close(one.double() / greatest, other.double() / greatest, atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_the_reference_is_autograds(size):
    q, k, v, do, lo, hi = inputs(size, torch.float64, requires_grad=True)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    out, _ = plainly(q, k, v, lo, hi, 0.3)
    wanted = torch.autograd.grad(out, (q, k, v), do)
    found = reference.span_attention_backward(q.detach(), k.detach(), v.detach(), lo, hi, lse, delta, do, scale=0.3)
    near(found, wanted, 1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_kernels_are_the_reference(size, dtype):
    q, k, v, do, lo, hi = inputs(size, dtype)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    exactly = (x.double() for x in (q, k, v))
    wanted = reference.span_attention_backward(*exactly, lo, hi, lse.double(), delta.double(), do.double(), scale=0.3)
    tiles = None if CUDA or dtype != torch.float32 else SMALL
    found = triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3, tiles=tiles)
    assert {x.dtype for x in found} == {dtype}
    near(found, wanted, TOLERANCE[dtype])
    again = triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3, tiles=tiles)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_products_are_those_of_each_output(size, dtype):
    q, k, v, do, lo, hi = inputs(size, dtype)
    outs, lses = [], []
    for j in range(lo.shape[-1]):
        out, lse = plainly(q.double(), k.double(), v.double(), lo[..., j : j + 1], hi[..., j : j + 1], 0.3)
        outs.append((out * do.double()).sum(-1))
        lses.append(lse)
    lse = torch.stack(lses, -1)
    exact = reference.span_products(q.double(), k.double(), v.double(), lo, hi, lse, do.double(), scale=0.3)
    near([exact], [torch.stack(outs, -1)], 1e-12)
    tile = None if CUDA else SMALL[0]
    found = triton_backward.span_products(q, k, v, lo, hi, lse.float(), do, scale=0.3, tile=tile)
    near([found], [exact], TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 2, 3, 16), (2, 5, 37, 20)])
def test_products_of_rows(shape):
    do, out = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    wanted = (do.double() * out.double()).sum(-1)
    for found in (reference.row_products(do, out), triton_backward.row_products(do.mT.contiguous().mT, out)):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    shared = do[..., 0, :]
    wanted = (shared.double().unsqueeze(-2) * out.double()).sum(-1)
    for found in (reference.row_products(shared, out), triton_backward.row_products(shared, out)):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bands", [2, 4])
def test_bands_change_nothing(bands):
    q, k, v, do, lo, hi = inputs((1, 1, 2, 7, 50, 16, 16, 2), torch.float32)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    wanted = reference.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3)
    order = SpanOrder.of(lo, hi, k.shape[1], k.shape[2], bands)
    found = triton_backward.span_attention_backward(
        q, k, v, lo, hi, lse, delta, do, scale=0.3, order=order, tiles=(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1))
    )
    near(found, [x.double() for x in wanted], TOLERANCE[torch.float32])
    wanted = reference.span_products(q, k, v, lo, hi, lse, do, scale=0.3)
    found = triton_backward.span_products(q, k, v, lo, hi, lse, do, scale=0.3, order=order)
    near([found], [wanted.double()], TOLERANCE[torch.float32])


@pytest.mark.parametrize("first,count,longest,shortest", [(0, 65536, 1024, 0), (32768, 32768, 1024, 725), (0, 1, 4, 4)])
def test_bands_are_more_where_lengths_differ_more(first, count, longest, shortest):
    assert span_order.bands(first, count, 16, longest, shortest) == {0: 11, 32768: 4}[first] if count > 1 else 1


def test_the_copy_engine_brings_the_same():
    q, k, v, do, lo, hi = inputs((2, 2, 2, 7, 50, 16, 16, 2), torch.float16)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    tiles = (Tile(16, 16, 4, 1), Tile(16, 64, 4, 1))
    for version, given in (
        (triton_backward.span_attention_backward, dict(lse=lse, delta=delta, do=do, tiles=tiles)),
        (triton_backward.span_products, dict(lse=lse, do=do, tile=tiles[0])),
    ):
        found, wanted = (version(q, k, v, lo, hi, scale=0.3, engine=engine, **given) for engine in (True, False))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_inputs_may_be_views():
    q, k, v, do, lo, hi = inputs(SIZES[2], torch.float32)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    whole = triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do)]
    found = triton_backward.span_attention_backward(*turned[:3], lo, hi, lse, delta, turned[3], scale=0.3)
    assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True))


def test_rows_that_lie_far_apart_pass_over_what_lies_between():
    size = (1, 1, 1, 3, 17000, 16, 16, 1)
    q, k, v, do, lo, hi = inputs(size, torch.float32)
    lo = torch.tensor([5, 8000, 16900], device=DEVICE).view(1, 1, 3, 1)
    hi = lo + 40
    k[:, :, 100:7900] = v[:, :, 100:7900] = float("nan")  # read by nobody: 0 * NaN would show
    lse, delta = torch.full(lo.shape, 9.0, device=DEVICE), torch.zeros(lo.shape, device=DEVICE)
    assert triton_backward._sparse(3, 17000, SMALL[0])
    tiles = None if CUDA else (Tile(16, 32, 4, 1), Tile(16, 1024, 4, 1))  # the interpreter's time goes by blocks
    dq, dk, dv = triton_backward.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3, tiles=tiles)
    assert dq.isfinite().all() and dv.isfinite().all()
    assert (dk[:, :, 1024:7168] == 0).all() and (dv[:, :, 45 + 1 : 8000] == 0).all()


@pytest.mark.parametrize("window", [1, 30, 1000])
def test_a_windows_gradients(window):
    q, k, v, do, *_ = inputs((1, 2, 3, 21, 60, 16, 16, 1), torch.float64, requires_grad=True)
    out, lse = window_reference.window_attention(q, k, v, window=window, scale=0.3)
    wanted = torch.autograd.grad(out, (q, k, v), do)
    q, k, v = (x.detach() for x in (q, k, v))
    given = (lse.detach(), (out * do).sum(-1).detach())
    near(window_reference.window_attention_backward(q, k, v, *given, do, window=window, scale=0.3), wanted, 1e-12)
    single = [x.float() for x in (q, k, v, *given, do)]
    near(
        window_attention.window_attention_backward(*single, window=window, scale=0.3), wanted, TOLERANCE[torch.float32]
    )


def test_a_windows_gradients_by_the_kernels(monkeypatch):
    q, k, v, do, *_ = inputs((1, 2, 3, 21, 60, 16, 16, 1), torch.float32)
    lse, delta = torch.full(q.shape[:3], 3.0, device=DEVICE), torch.ones(q.shape[:3], device=DEVICE)
    wanted = window_reference.window_attention_backward(q, k, v, lse, delta, do, window=30, scale=0.3)
    monkeypatch.setattr(window_attention, "serves", lambda q, v: True)
    found = window_attention.window_attention_backward(q, k, v, lse, delta, do, window=30, scale=0.3)
    near(found, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_anchors_gradients(size, dtype):
    q, k, _, _, anchors, _ = inputs(size, torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    d_scores = torch.randn(anchors.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    d_scores[..., -1] = 0.0  # no anchor
    before = torch.randn(k.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    wanted = torch.autograd.grad(anchor_reference.anchor_scores(q, k, anchors), (q, k), d_scores)
    q, k = q.detach(), k.detach()
    dk = before.clone()
    dq = anchor_scores.anchor_scores_backward(q, k, anchors, d_scores, dk)
    near([dq, dk - before], wanted, 1e-12)
    dk = before.to(dtype)
    dq = anchor_kernels.anchor_scores_backward(q.to(dtype), k.to(dtype), anchors, d_scores.float(), dk)
    near([dq, dk - before.to(dtype)], wanted, 2 * TOLERANCE[dtype])
    again = before.to(dtype)
    assert torch.equal(
        dq, anchor_kernels.anchor_scores_backward(q.to(dtype), k.to(dtype), anchors, d_scores.float(), again)
    )
    assert torch.equal(dk, again)


def test_faces_are_the_references_where_no_kernel_serves():
    q, k, v, do, lo, hi = inputs(SIZES[2], torch.float64)
    lse, delta = merged(q, k, v, do, lo, hi, 0.3)
    assert not span_attention.serves(q), "no kernel computes in float64"
    found = span_attention.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3)
    wanted = reference.span_attention_backward(q, k, v, lo, hi, lse, delta, do, scale=0.3)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
