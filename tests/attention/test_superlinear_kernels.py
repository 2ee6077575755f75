"""Superlinear by kernels (in Triton's interpreter, or on a GPU where there is one) equals its plain version."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from longspan.attention import superlinear_kernels as ours
from longspan.attention.base import Hints, Mechanism
from longspan.attention.superlinear import Superlinear
from longspan.kernels import superlinear as kernels
from longspan.kv.base import PAGE, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
if DEVICE.type == "cuda":
    SIZES = [(4097, 1, (4, 2)), (397, 3, (3, 1)), (9001, 63, (16, 1)), (4097, 4097, (4, 2)), (70001, 4097, (32, 2))]
else:
    SIZES = [(197, 1, (4, 2)), (131, 5, (16, 1)), (47, 4, (3, 1)), (29, 29, (2, 2))]
# Queries up to which each is a decode step; so few, and so many.
STEPS, FEW, MANY = (ours.STEPS, 3, 40) if DEVICE.type == "cuda" else (2, 1, 5)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch):
    """The interpreter's tensors lie on the CPU, where kernels do not offer themselves."""
    monkeypatch.setattr(kernels, "serves", lambda *_: True)
    monkeypatch.setattr(ours, "STEPS", STEPS)


def paged(k, v, kv_format=None, rotary=None):
    pool = PagePool(k.shape[1], k.shape[-1], v.shape[-1], k.dtype, DEVICE, kv_format=kv_format)
    pool.native.reserve(40)
    other = PagedKV(pool)
    held = PagedKV(pool, rotary)
    for start in range(0, k.shape[2], 100):
        held.append(k[:, :, start : start + 100], v[:, :, start : start + 100])
        other.append(k[:, :, :50], v[:, :, :50])  # so that pages are no neighbours
    held.commit()
    return held


def made(n, count, heads=(4, 2), dim=16, dtype=torch.float32, value_dim=20, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return normal(batch, heads[0], count, dim), normal(batch, heads[1], n, dim), normal(batch, heads[1], n, value_dim)


def both(mechanism, q, kv, hints=None):
    hints = hints or Hints()
    scale = 1 / math.sqrt(q.shape[-1])
    return ours.attend(mechanism, q, kv, scale, hints), Mechanism.attend(mechanism, q, kv, scale=scale, hints=hints)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate,sinks", [("joint", 0), ("joint", 5), ("routed", 5)])
@pytest.mark.parametrize("n,count,heads", SIZES)
def test_kernels_equal_the_plain_version(dtype, gate, sinks, n, count, heads):
    q, k, v = made(n, count, heads, dtype=dtype)
    mechanism = Superlinear(window=24, gate=gate, sinks=sinks)
    out, wanted = both(mechanism, q, TensorKV(k, v))
    torch.testing.assert_close(out.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("power,span_power,spans", [(0.55, 0.55, 2), (0.5, 0.4, 4), (0.5, 0.5, 1), (0.5, 0.5, 0)])
def test_every_option(count, power, span_power, spans):
    q, k, v = made(257, count)
    mechanism = Superlinear(window=30, power=power, span_power=span_power, spans=spans, backward=2.5, forward=0.7)
    out, wanted = both(mechanism, q, TensorKV(k, v))
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("gate,heads", [("joint", (6, 2)), ("routed", (4, 1))])
def test_a_group_chooses_together(count, gate, heads):
    q, k, v = made(197, count, heads)
    rotary = Rotary(10000.0 ** -(torch.arange(6) / 6), 150)
    mechanism = Superlinear(window=24, gate=gate, share="group", sinks=3)
    for kv in (TensorKV(k, v), TensorKV(k, v, rotary)):
        out, wanted = both(mechanism, q, kv)
        torch.testing.assert_close(out, wanted, atol=5e-6, rtol=5e-6)
    summed = q.unflatten(1, (heads[1], -1)).sum(2).repeat_interleave(heads[0] // heads[1], 1)
    alone = Superlinear(window=24, gate=gate, sinks=3)
    out = both(mechanism, q, TensorKV(k, v))[0]
    torch.testing.assert_close(
        out, both(alone, q, TensorKV(k, v), Hints(routing_query=summed))[0], atol=5e-6, rtol=5e-6
    )


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("gate", ["joint", "routed"])
def test_a_routing_query_searches(count, gate):
    q, k, v = made(300, count)
    routing = made(300, count, seed=1)[0]
    out, wanted = both(Superlinear(window=24, gate=gate), q, TensorKV(k, v), Hints(routing_query=routing))
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("trained", [None, 332, 290])
@pytest.mark.parametrize("gate,sinks", [("joint", 0), ("joint", 4), ("routed", 4)])
def test_positions_are_read_as_the_plain_version_does(count, trained, gate, sinks):
    q, k, v = made(340, count, value_dim=16)
    rotary = Rotary(10000.0 ** -(torch.arange(6) / 6), trained)  # 12 of 16 channels turn
    kv = paged(k, v, rotary=rotary)
    out, wanted = both(Superlinear(window=24, gate=gate, sinks=sinks), q, kv)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("count", [FEW, MANY])
@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_pages_in_any_order_and_format(count, kv_format):
    q, k, v = made(397, count, value_dim=16)
    kv = paged(k, v, kv_format)
    held = kv.held("k")
    assert held.kind == (1 if kv_format is None else 2)
    torch.testing.assert_close(held.gathered(0, 397), kv.keys(0, 397)[0])
    out, wanted = both(Superlinear(window=24), q, kv)
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("rotary", [None, Rotary(10000.0 ** -(torch.arange(8) / 8), 330)])
def test_pages_that_lie_together_are_one_tensor_to_many_queries(rotary):
    q, k, v = made(397, MANY, value_dim=16)
    pool = PagePool(k.shape[1], 16, 16, k.dtype, k.device)
    pool.reserve(20)
    first, kv = PagedKV(pool, rotary), PagedKV(pool, rotary)
    first.append(v[:, :, :100], k[:, :, :100])  # another context's pages lie before
    kv.append(k, v)
    held = kv.held("k", whole=True)
    assert held.kind == 0 and held.rows.data_ptr() != pool.keys.data_ptr() and kv.held("k").kind == 1
    assert torch.equal(held.rows, kv.keys(0, 397)) and held.rows.stride(1) == 20 * PAGE * 16
    out, wanted = both(Superlinear(window=24, sinks=4), q, kv)
    torch.testing.assert_close(out, wanted, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_several_sequences(count):
    q, k, v = made(120, count, batch=3)
    mechanism = Superlinear(window=24)
    out, wanted = both(mechanism, q, TensorKV(k, v))
    torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)
    apart = [both(mechanism, q[b : b + 1], TensorKV(k[b : b + 1], v[b : b + 1]))[0] for b in range(3)]
    torch.testing.assert_close(out, torch.cat(apart), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_what_is_not_read_never_reaches_an_output(count):
    q, k, v = made(150, count, value_dim=16)
    mechanism = Superlinear(window=24, backward=0.3, forward=0.2)
    clean = both(mechanism, q, TensorKV(k, v))[0]
    seen = 0
    for i in (100, 118):
        one = torch.zeros_like(v)
        one[:, :, i] = 1.0
        reads = (ours.attend(mechanism, q, TensorKV(k, one), 0.25, Hints()) != 0).any(-1)
        poisoned = v.clone()
        poisoned[:, :, i] = float("nan")
        out = ours.attend(mechanism, q, TensorKV(k, poisoned), 0.25, Hints())
        assert torch.equal(out[~reads], clean[~reads])
        assert out[reads].isnan().all()
        seen += int(reads.sum())
    assert 0 < seen < 2 * reads.numel()


def test_prefill_in_chunks_and_decode_agree():
    count = 2 * MANY
    q, k, v = made(110 + count, count, value_dim=16)
    mechanism = Superlinear(window=24)
    scale = 0.25
    whole = ours.attend(mechanism, q, TensorKV(k, v), scale, Hints())
    for sizes in ([MANY, MANY], [1, 2 * MANY - 1]):
        parts, at = [], 0
        for size in sizes:
            rows = q[:, :, at : at + size]
            at += size
            kv = TensorKV(k[:, :, : 110 + at], v[:, :, : 110 + at])
            parts.append(ours.attend(mechanism, rows, kv, scale, Hints()))
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=2e-6, rtol=2e-6)


def test_equal_scores_go_to_the_newer_anchor():
    _, k, v = made(197, MANY, value_dim=16)
    q = torch.randint(-3, 4, (1, 4, MANY, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float32)
    k = k[:, :, :1].round().expand_as(k).contiguous()  # sums are exact, so that equal means equal
    for count in (1, MANY):
        out, wanted = both(Superlinear(window=24), q[:, :, :count], TensorKV(k, v))
        torch.testing.assert_close(out, wanted, atol=3e-6, rtol=3e-6)


def test_a_step_of_sequences_of_different_lengths():
    q, k, v = made(300, 4, value_dim=16)
    pages = torch.zeros(2, 5, 64, 16, device=DEVICE), torch.zeros(2, 5, 64, 16, device=DEVICE)
    for page, rows in zip(pages, (k, v), strict=True):
        page.view(2, 320, 16)[:, :300] = rows[0]
        page.view(2, 320, 16)[:, 300:] = float("nan")
    table = torch.arange(5, device=DEVICE).expand(3, -1).contiguous()
    held = [kernels.Held(page, table) for page in pages]
    lengths = torch.tensor([300, 41, 163], device=DEVICE)
    search = ours.search_of(Superlinear(window=24))
    out = kernels.decode(q[0, :, :3].transpose(0, 1).contiguous(), *held, lengths, search, scale=0.25)
    for b, n in enumerate(lengths.tolist()):
        alone = TensorKV(k[:, :, :n], v[:, :, :n])
        wanted = Mechanism.attend(Superlinear(window=24), q[:, :, b : b + 1], alone, scale=0.25)
        torch.testing.assert_close(out[b], wanted[0, :, 0], atol=3e-6, rtol=3e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="graphs are CUDA's")
def test_a_step_in_a_graph_follows_the_lengths():
    q, k, v = made(4096, 1, (32, 2), 128, torch.bfloat16, 128)
    table = torch.randperm(64, device=DEVICE).unsqueeze(0)
    held = [kernels.Held(x.view(2, 64, 64, 128)[:, torch.argsort(table[0])].contiguous(), table) for x in (k, v)]
    lengths, search = torch.tensor([2000], device=DEVICE), ours.search_of(Superlinear(window=120))
    row = q[:, :, 0].contiguous()
    kernels.decode(row, *held, lengths, search, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode(row, *held, lengths, search, scale=0.1)
    for n in (2000, 4096, 133, 3001):
        lengths.fill_(n)
        out.fill_(float("nan"))
        graph.replay()
        wanted = Mechanism.attend(Superlinear(window=120), q, TensorKV(k[:, :, :n], v[:, :, :n]), scale=0.1)
        torch.testing.assert_close(out, wanted[:, :, 0], atol=2e-2, rtol=2e-2)
