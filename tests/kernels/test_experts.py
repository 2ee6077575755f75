"""Every version of routing and of a mixture of experts against float64, one token and one expert after another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from longspan.kernels.experts import Routing, experts, mixture, reference, route

pytest.importorskip("triton")
from longspan.kernels.experts import triton_decode, triton_kernels, triton_prefill
from longspan.kernels.experts.triton_prefill import Cut

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CUT_OFF = 5e-5 if CUDA else 2e-6
"""Float32 by tensor cores: three TF32 products, whose sums of 2,688 numbers are cut off, not rounded, 1,000 times."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter's bfloat16 dot is wrong
SIZES = [
    # tokens, experts, top, width, inner, of the shared expert, activation, gated
    (13, 3, 2, 40, 24, 0, "relu2", False),
    (1, 8, 3, 32, 24, 56, "relu2", False),
    (2, 4, 1, 16, 16, 16, "silu", True),
    (9, 3, 3, 24, 40, 0, "silu", True),
]
CUTS = [Cut(16, 16, 16, 4, 2), Cut(16, 32, 32, 4, 2, programs=1)]
STEPS = [triton_decode.Cut(32, 64, 4, 32, 64, 4)]
"""The interpreter's time goes by programs: few."""
if CUDA:
    SIZES += [(500, 16, 6, 2688, 1856, 3712, "relu2", False), (300, 16, 4, 1024, 768, 0, "silu", True)]
    CUTS += [Cut(128, 256, 64, 8, 3, programs=1), Cut(128, 128, 64, 8, 3, programs=1), Cut(64, 64, 64, 4, 3)]
ROUTINGS = [
    (7, Routing(2)),
    (8, Routing(3, groups=4, top_groups=2, scale=2.5)),
    (24, Routing(6, groups=2, top_groups=1)),
    (12, Routing(4, normalise=False)),
    (5, Routing(5, scores="softmax", scale=0.5)),
    (128, Routing(6, scale=2.5)),
]


def inputs(tokens, number, top, width, inner, besides, gated, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    x, rows = normal(tokens, width), inner * (1 + gated)
    up, down = normal(number, rows, width) / width**0.5, normal(number, width, inner) / inner**0.5
    shared = (normal(besides * (1 + gated), width) / width**0.5, normal(width, besides) / besides**0.5)
    ids = torch.rand(tokens, number, generator=generator).argsort(-1)[:, :top].int().to(DEVICE)
    weights = torch.rand(tokens, top, generator=generator, dtype=torch.float64).to(DEVICE, torch.float32)
    return (x, up, down, ids, weights), {"shared": shared if besides else None, "residual": normal(tokens, width)}


def one(x, up, down, activation, gated):
    """One expert, one token, in float64."""
    hidden = up.double() @ x.double()
    hidden, other = hidden.chunk(2) if gated else (hidden, 1.0)
    hidden = hidden.clamp(min=0) ** 2 if activation == "relu2" else hidden / (1 + (-hidden).exp())
    return down.double() @ (hidden * other)


def loop(x, up, down, ids, weights, activation, shared, residual):
    gated, out = up.shape[1] == 2 * down.shape[2], residual.double().clone()
    for t in range(x.shape[0]):
        for i, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            out[t] += weight * one(x[t], up[i], down[i], activation, gated)
        if shared is not None:
            out[t] += one(x[t], *shared, activation, gated)
    return out


def close(found, wanted, dtype, tolerance=None):
    assert found.dtype == dtype
    tolerance = tolerance or TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, atol=4 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("size", SIZES)
def test_every_version_equals_a_loop(size, dtype, monkeypatch):
    *sizes, activation, gated = size
    given, more = inputs(*sizes, gated, dtype)
    wanted = loop(*given, activation, **more)
    more["activation"] = activation
    close(reference.experts(*given, **more), wanted, dtype)
    close(experts(*given, **more), wanted, dtype, CUT_OFF if dtype == torch.float32 else None)
    if dtype == torch.float64:
        return
    poisoned(monkeypatch)
    for cut, engine in itertools.product(CUTS, (False, True)):
        if dtype == torch.float32 and (engine or cut.rows * cut.columns > 4096):
            continue  # the copy engine brings halves alone; and such a tile has no room
        if gated and cut.columns > 128:
            continue  # nor has one of twice as many
        found = triton_prefill.experts(*given, **more, cuts=(cut, cut), engine=engine)
        close(found, wanted, dtype, CUT_OFF if dtype == torch.float32 else None)
    for step in [None, *STEPS] if CUDA else STEPS if sizes[0] <= 2 else []:
        close(triton_decode.experts(*given, **more, cut=step), wanted, dtype)


def poisoned(monkeypatch):
    """What is allocated but not written holds NaN, or where that is no number an index that is far outside."""
    empty = torch.empty

    def poison(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize("number,routing", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
def test_every_version_routes_alike(number, routing, biased, monkeypatch):
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(21, number, generator=generator).to(DEVICE) * 2
    logits[3] = 0.5  # all alike: the first are taken
    logits[4, 1] = float("nan")
    bias = torch.randn(number, generator=generator).to(DEVICE) if biased else None
    ids, weights = reference.route(logits, bias, routing)
    poisoned(monkeypatch)
    found_ids, found_weights = triton_kernels.route(logits, bias, routing)
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found_weights, weights, atol=1e-6, rtol=1e-5, equal_nan=True)
    assert all(len(set(row)) == routing.top for row in ids.tolist())


def test_routing_by_hand():
    """Three groups of two: the first has the best expert, the second the best two. A bias only chooses."""
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7, 0.3, 0.2]], dtype=torch.float64)
    logits, bias = scores.logit(), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    ids, weights = route(logits, None, top=2, groups=3, top_groups=1)
    assert ids.tolist() == [[2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.8 / 1.5, 0.7 / 1.5]], dtype=torch.float64))
    ids, weights = route(logits, bias, top=3, groups=3, top_groups=2, normalise=False, scale=2.0)
    assert ids.tolist() == [[5, 2, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 1.6, 1.4]], dtype=torch.float64))


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_step_that_routes_equals_both(tokens, scores, monkeypatch):
    routing = Routing(3, groups=2, top_groups=1 if scores == "sigmoid" else 2, scale=2.5, scores=scores)
    (x, up, down, _, _), more = inputs(tokens, 8, 3, 24, 16, 20, False, torch.float32)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, 8, generator=generator).to(DEVICE)
    bias = torch.randn(8, generator=generator).to(DEVICE)
    wanted = loop(x, up, down, *reference.route(logits, bias, routing), "relu2", **more)
    close(mixture(x, logits, bias, up, down, routing=routing, **more), wanted, torch.float32)
    poisoned(monkeypatch)
    for step in (STEPS[-1], replace(STEPS[-1], apart=True)):
        found = triton_decode.mixture(x, logits, bias, up, down, routing=routing, cut=step, **more)
        close(found, wanted, torch.float32)


@pytest.mark.parametrize("tokens,number,top,pad", [(400, 5, 3, 16), (1, 300, 8, 16), (65, 4, 1, 128), (30, 2, 2, 32)])
def test_a_layout_has_every_pair_once(tokens, number, top, pad):
    ids = inputs(tokens, number, top, 16, 16, 0, False, torch.float32)[0][3]
    ids[ids == 1] = 0 if top == 1 else 1  # an expert that nobody chose
    layout = triton_kernels.Layout.of(ids, number, pad)
    place, used = layout.place.flatten().long(), int(layout.tiles)
    assert len(set(place.tolist())) == ids.numel() and int(place.max()) < used * pad <= layout.capacity
    assert torch.equal(layout.expert[place // pad], ids.flatten())
    counts = torch.bincount(ids.flatten().long(), minlength=number)
    assert used == int(((counts + pad - 1) // pad).sum()), "no tile more than there must be"
    order = ids.flatten().argsort(stable=True)
    apart = ids.flatten()[order].diff() != 0
    assert ((place[order].diff() == 1) | apart).all(), "an expert's rows follow each other in the order of tokens"


def test_two_runs_are_equal_and_tokens_are_independent():
    given, more = inputs(13, 5, 2, 24, 16, 0, False, torch.float32)
    x, up, down, ids, weights = given
    cuts = (CUTS[0], CUTS[0])
    clean = triton_prefill.experts(*given, **more, cuts=cuts)
    assert torch.equal(triton_prefill.experts(*given, **more, cuts=cuts), clean)
    spoilt, others = x.clone(), torch.arange(13, device=DEVICE) != 7
    spoilt[7] = float("nan")
    found = triton_prefill.experts(spoilt, up, down, ids, weights, **more, cuts=cuts)
    assert torch.equal(found[others], clean[others]) and found[7].isnan().all()
    unused = up.clone()
    unused[int(ids[0, 0])] = float("inf")
    free = (ids != ids[0, 0]).all(1)
    found = triton_prefill.experts(x, unused, down, ids, weights, **more, cuts=cuts)
    assert free.any() and torch.equal(found[free], clean[free])


def test_weights_may_be_parts_of_a_larger_tensor():
    (x, up, down, ids, weights), more = inputs(2, 4, 2, 24, 16, 0, False, torch.float16)
    wide_up, wide_down = up.repeat(1, 2, 1)[:, :16], down.repeat(1, 1, 2)[:, :, :16]
    for version, extra in (
        (triton_prefill, {"cuts": (CUTS[0], CUTS[0]), "engine": True}),
        (triton_decode, {"cut": STEPS[-1]}),
    ):
        wanted = version.experts(x, up, down, ids, weights, **more, **extra)
        assert torch.equal(version.experts(x, wide_up, wide_down, ids, weights, **more, **extra), wanted)
