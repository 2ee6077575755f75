"""Gradients of superlinear attention: autograd of the plain path, and the kernels' own equations, against loops."""

from __future__ import annotations

import pytest
import torch
from plain import superlinear_parts

from longspan.attention import attend, make, superlinear_gradients
from longspan.attention.base import Hints
from longspan.kv.base import TensorKV
from longspan.kv.rotary import Rotary

CUDA = torch.cuda.is_available()
OPTIONS = dict(window=12, spans=2, backward=1.5, forward=1.0)
CASES = [
    dict(gate="joint"),
    dict(gate="routed"),
    dict(gate="joint", sinks=3),
    dict(gate="routed", sinks=20, spans=3),
    dict(gate="routed", spans=6, backward=3.0),
    dict(gate="routed", spans=0),
]
IDS = [",".join(f"{key}={value}" for key, value in case.items()) for case in CASES]


def inputs(batch=1, kv_heads=2, group=3, queries=9, keys=70, dim=6, value_dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(heads, count, size):
        return torch.randn(batch, heads, count, size, generator=generator, dtype=torch.float64).to(dtype)

    heads = kv_heads * group
    tensors = [normal(heads, queries, dim), normal(kv_heads, keys, dim), normal(kv_heads, keys, value_dim)]
    tensors.append(normal(heads, queries, dim))  # the routing query
    return [x.requires_grad_() for x in tensors], normal(heads, queries, value_dim)


def plainly(q, k, v, routing, mechanism):
    """The equations, a query after the other, so that autograd differentiates all but the choice."""
    rows = []
    group, first = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        t, keys, values = first + i, k[b, h // group], v[b, h // group]
        whole, anchors = superlinear_parts(t, mechanism.window, mechanism.power)
        near = set(range(max(0, t - whole + 1), t + 1)) | set(range(min(mechanism.sinks, t + 1)))
        scored = sorted(((float(routing[b, h, i] @ keys[a]), a) for a in anchors), key=lambda one: (-one[0], -one[1]))
        chosen = [a for _, a in scored[: mechanism.spans]]
        reads = [near | set(range(mechanism.span(t, a)[0], mechanism.span(t, a)[1] + 1)) for a in chosen]
        if mechanism.gate == "joint" or not chosen:
            reads = [near.union(*reads)]
        outs = []
        for read in reads:
            at = sorted(read)
            outs.append(torch.softmax(keys[at] @ q[b, h, i] / q.shape[-1] ** 0.5, 0) @ values[at])
        weights = torch.ones(1, dtype=q.dtype)
        if mechanism.gate == "routed" and chosen:
            weights = torch.softmax(keys[chosen] @ routing[b, h, i], 0)
        rows.append(weights @ torch.stack(outs))
    return torch.stack(rows).view(*q.shape[:3], -1)


def by_equations(q, k, v, mechanism, routing, rotary=None):
    """What runs where kernels serve, here by their references."""
    return superlinear_gradients.attend(mechanism, q, TensorKV(k, v, rotary), None, Hints(routing_query=routing))


def gradients(out, tensors, do):
    found = torch.autograd.grad(out, tensors, do, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in zip(found, tensors, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("queries,keys,batch", [(1, 70, 1), (5, 70, 2), (33, 33, 1)])
@pytest.mark.parametrize("routed_apart", [False, True])
def test_gradients_are_those_of_the_equations(case, queries, keys, batch, routed_apart):
    tensors, do = inputs(batch, 1 if keys == 33 else 2, 3, queries, keys)
    q, k, v, routing = tensors
    used = tensors if routed_apart else tensors[:3]
    routing = routing if routed_apart else None
    mechanism = make("superlinear", **{**OPTIONS, **case})
    truth = plainly(q, k, v, q if routing is None else routing, mechanism)
    wanted = gradients(truth, used, do)
    for out in (attend(q, k, v, mechanism, routing_query=routing), by_equations(q, k, v, mechanism, routing)):
        torch.testing.assert_close(out, truth, atol=1e-12, rtol=1e-12)
        for one, other in zip(gradients(out, used, do), wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("gate", ["joint", "routed"])
def test_gradcheck(gate):
    (q, k, v, routing), _ = inputs(1, 1, 2, 3, 30, 4, 3)
    mechanism = make("superlinear", **{**OPTIONS, "window": 8, "gate": gate})
    # The second backward pass over a graph computes the columns' outputs again, and rounds them otherwise.
    assert torch.autograd.gradcheck(
        lambda *x: by_equations(*x[:3], mechanism, x[3]), (q, k, v, routing), fast_mode=True, nondet_tol=1e-12
    )


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_second_pass_over_the_graph_gives_the_same(case):
    tensors, do = inputs(queries=5)
    out = by_equations(*tensors[:3], make("superlinear", **{**OPTIONS, **case}), tensors[3])
    first, second = (torch.autograd.grad(out, tensors, do, retain_graph=True, allow_unused=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("gate", ["joint", "routed"])
@pytest.mark.parametrize("routed_apart", [False, True])
def test_rotation_is_differentiated_through(gate, routed_apart):
    (q, k, v, routing), do = inputs(dim=8, dtype=torch.float64)
    rotary = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=torch.float64))
    mechanism = make("superlinear", **{**OPTIONS, "gate": gate})
    used = (q, k, v, routing) if routed_apart else (q, k, v)
    hints = Hints(routing_query=routing if routed_apart else None)
    wanted = gradients(mechanism.attend(q, TensorKV(k, v, rotary), hints=hints), used, do)
    found = gradients(by_equations(q, k, v, mechanism, hints.routing_query, rotary), used, do)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("summary,gate", [("bounds", "joint"), ("bounds", "routed"), ("key", "routed")])
def test_every_kind_of_search_has_gradients_on_a_cpu(summary, gate):
    tensors, _ = inputs(queries=5, keys=300)
    used = tensors if gate == "routed" else tensors[:3]
    mechanism = make("superlinear", **{**OPTIONS, "window": 64, "summary": summary, "gate": gate})
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x[:3], mechanism, routing_query=x[3] if len(x) > 3 else None), used, fast_mode=True
    )


def test_only_wanted_gradients_are_for_the_kernels():
    (q, k, v, _), _ = inputs()
    mechanism = make("superlinear", **OPTIONS)
    assert not superlinear_gradients.serves(mechanism, q, TensorKV(k, v), Hints()), "no kernel serves float64 on a CPU"


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("queries,keys", [(1, 70), (5, 70), (33, 33)])
def test_kernels_serve(monkeypatch, case, queries, keys):
    """The whole pass by the kernels, on a GPU or in Triton's interpreter."""
    pytest.importorskip("triton")
    from longspan.kernels import anchor_scores, span_attention, superlinear, window_attention

    if not CUDA:
        if make("superlinear", **{**OPTIONS, **case}).spans <= superlinear.MOST_SPANS:
            monkeypatch.setattr(superlinear, "serves", lambda *_: True)
        for room in (span_attention, anchor_scores):
            monkeypatch.setattr(room, "serves", lambda q: True)
        monkeypatch.setattr(window_attention, "serves", lambda q, v: True)
        monkeypatch.setattr(superlinear_gradients, "kernels_serve", lambda q: True)
    tensors, do = inputs(1, 1, 3, queries, keys, 16, 16)
    mechanism = make("superlinear", **{**OPTIONS, **case})
    wanted = gradients(plainly(*tensors, mechanism), tensors, do)
    device = "cuda" if CUDA else "cpu"
    q, k, v, routing = used = [x.detach().float().to(device).requires_grad_() for x in tensors]
    assert superlinear_gradients.serves(mechanism, q, TensorKV(k, v), Hints())
    found = gradients(attend(q, k, v, mechanism, routing_query=routing), used, do.float().to(device))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not CUDA, reason="sizes that take a GPU")
@pytest.mark.parametrize("gate", ["joint", "routed"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("queries,keys", [(1, 5000), (63, 9001), (4097, 4097), (4097, 20000)])
def test_a_gpu_agrees_with_autograd_in_float64(gate, dtype, tolerance, queries, keys):
    tensors, do = inputs(1, 2, 4, queries, keys, 64, 64, dtype=dtype)
    mechanism = make("superlinear", window=500, gate=gate)
    used = [x.detach().cuda().requires_grad_() for x in tensors]
    found = gradients(attend(*used[:3], mechanism, routing_query=used[3]), used, do.cuda())
    again = gradients(attend(*used[:3], mechanism, routing_query=used[3]), used, do.cuda())
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    exactly = [x.detach().double().cuda().requires_grad_() for x in tensors]
    wanted = gradients(attend(*exactly[:3], mechanism, routing_query=exactly[3]), exactly, do.double().cuda())
    # A choice between two nearly equal spans may fall either way: its query's gradients are another's.
    for one, other in zip(found, wanted, strict=True):
        if not other.any():  # one softmax over everything: searches have no gradients
            assert gate == "joint" and not one.any()
            continue
        error = (one.double() - other).norm(dim=-1) / other.norm(dim=-1).mean()
        assert error.median() < tolerance and (error < 10 * tolerance).double().mean() > 0.98
