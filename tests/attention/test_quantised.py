"""Mechanisms over quantised pages: they read what the pages give back, and dense is as near as the steps allow."""

import math

import pytest
import torch

from longspan.attention import Shape, make, mechanisms
from longspan.attention.base import Hints
from longspan.kv import formats, hadamard
from longspan.kv.base import PAGE, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

HEADS, GROUP, DIM = 2, 3, 16
LENGTH = 20 * PAGE + 21
CASES = {
    "dense": {},
    "streaming": dict(window=200, sinks=8),
    "sparse": dict(window=200),
    "superlinear": dict(window=150, spans=2, sinks=4),
    "quest": dict(budget=400, dense_layers=0),
    "sparq": dict(budget=400, dense_layers=0),
    "tree": dict(window=100, leaves=4, beam=4),
    "retrieval": dict(window=200, read="place", pages=3),
    "xattention": dict(threshold=0.9),
}


def tensors(seed, count=LENGTH, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    offset = 3 * torch.randn(1, HEADS, 1, DIM, generator=gen, dtype=dtype)
    k = torch.randn(1, HEADS, count, DIM, generator=gen, dtype=dtype) + offset
    v = torch.randn(1, HEADS, count, DIM, generator=gen, dtype=dtype)
    return k, v


def quantised(spec, k, v, rotary=None, chunk=300, kinds=()):
    pool = PagePool(HEADS, DIM, DIM, k.dtype, torch.device("cpu"), kv_format=spec, summaries=kinds)
    kv = PagedKV(pool, rotary)
    for start in range(0, k.shape[2], chunk):
        kv.append(k[:, :, start : start + chunk], v[:, :, start : start + chunk])
        kv.commit()
    return kv


def queries(count, seed=9, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, HEADS * GROUP, count, DIM, generator=gen, dtype=dtype)


def test_every_mechanism_that_pages_serve_has_a_case():
    served = {name for name, cls in mechanisms().items() if not cls.evicts and not cls.needs_training}
    assert served == set(CASES), "those that evict or need training are read through contexts (tests/engine)"


@pytest.mark.parametrize("spec", ["int8", "int4", "int2", "int4:rotate=false,residual=0,sinks=0,group=64"])
@pytest.mark.parametrize("trained", [500, 10**6])
@pytest.mark.parametrize("name", CASES)
def test_a_mechanism_reads_what_pages_give_back(name, trained, spec):
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01]), trained)
    kv = quantised(spec, *tensors(0), rotary)
    assert {kv.resolution(page) for page in range(3, 17)} == {spec.partition(":")[0]}
    plain = TensorKV(kv.keys(0, LENGTH), kv.values(0, LENGTH), rotary)
    hints = Hints(chosen_pages=(7, 3, 11)) if name == "retrieval" else Hints()
    for count in (1, 70):
        mechanism, q = make(name, **CASES[name]), queries(count)
        found, wanted = (mechanism.attend(q, each, hints=hints) for each in (kv, plain))
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("residual,sinks", [(0, 0), (128, 64), (100, 1), (64, 300)])
def test_residual_and_sinks_are_kept_to_the_bit_and_all_else_is_not(residual, sinks):
    k, v = tensors(1)
    kv = quantised(f"int4:residual={residual},sinks={sinks}", k, v)
    first, last = -(-sinks // PAGE), (LENGTH - residual) // PAGE
    own = [kv.resolution(page) == "fp64" for page in range(len(kv.table))]
    assert own == [page < first or page >= last for page in range(len(kv.table))]
    for page, exact in enumerate(own):
        part = slice(page * PAGE, min((page + 1) * PAGE, LENGTH))
        assert torch.equal(kv.keys(part.start, part.stop), k[:, :, part]) == exact
        assert torch.equal(kv.values(part.start, part.stop), v[:, :, part]) == exact
    assert LENGTH - last * PAGE >= residual


@pytest.mark.parametrize("chunk", [1, 64, 100, LENGTH])
def test_chunks_do_not_matter_once_they_are_committed(chunk):
    k, v = tensors(2)
    kv, other = quantised("int4", k, v), quantised("int4", k, v, chunk=chunk)
    assert torch.equal(kv.keys(0, LENGTH), other.keys(0, LENGTH))
    assert torch.equal(kv.values(0, LENGTH), other.values(0, LENGTH))
    assert kv.nbytes == other.nbytes


def test_what_is_read_together_is_read_exactly():
    k, v = tensors(3)
    kv = quantised("int4:residual=0,sinks=0", k[:, :, :300], v[:, :, :300])
    kv.append(k[:, :, 300:900], v[:, :, 300:900])
    assert torch.equal(kv.keys(256, 900), k[:, :, 256:900]), "from the page on that was open"
    kv.append(k[:, :, 900:901], v[:, :, 900:901])
    assert torch.equal(kv.keys(256, 320), k[:, :, 256:320]), "a committed page may have to come back exactly"
    assert {kv.resolution(page) for page in range(5, 14)} == {"int4"}
    kv.truncate(300)
    assert torch.equal(kv.keys(256, 300), k[:, :, 256:300])


@pytest.mark.parametrize("spec", ["int8:rotate=false", "int8"])
def test_dense_over_int8_differs_by_no_more_than_its_steps_allow(spec):
    """Scores are off by at most `e = sum_d |q_d| step_d / 2 / sqrt(D)`, q rotated as keys are, and weights by exp(2 e).

    Values are off by half their step.
    """
    k, v = tensors(4, dtype=torch.float32)
    q = queries(1, dtype=torch.float32) / 2
    kv = quantised(spec, k, v)
    exact = make("dense").attend(q, TensorKV(k, v))
    out = make("dense").attend(q, kv)

    def half_steps(x, what):
        pages = x[0, :, : LENGTH // PAGE * PAGE].unflatten(1, (-1, PAGE))
        return kv.pool.format.encode(pages, what)[1].chunk(2, -1)[0].float() / 2

    turned = hadamard.rotate(q) if kv.pool.format.rotate else q
    off = float((turned.abs() * half_steps(k, "k").amax((0, 1, 2))).sum(-1).max()) / math.sqrt(DIM)
    bound = (math.exp(2 * off) - 1) * float(v.abs().max()) + float(half_steps(v, "v").max()) * math.exp(2 * off)
    worst = float((out - exact).abs().max())
    assert 0 < worst <= bound < 0.5, "and the bound says something"


@pytest.mark.parametrize("spec", ["fp8", "int8", "int4:residual=0,sinks=0", "int2:residual=0,sinks=0,group=64"])
@pytest.mark.parametrize("name", ["dense", "quest", "tree"])
def test_the_cost_model_counts_the_bytes_that_pages_take(name, spec):
    mechanism = make(name)
    n = 16 * 16 * PAGE
    kinds = mechanism.summaries
    pool = PagePool(
        HEADS, DIM, DIM, torch.float32, torch.device("cpu"), kv_format=spec, summaries=kinds, block=mechanism.block
    )
    kv = PagedKV(pool)
    kv.append(torch.zeros(1, HEADS, n, DIM), torch.zeros(1, HEADS, n, DIM))
    kv.commit()
    shape = Shape(HEADS * GROUP, HEADS, DIM, DIM, formats.parse(spec).number_bytes(DIM, DIM), own_bytes=4.0)
    kept = mechanism.cost(n, shape).kept_bytes
    if name != "tree":
        assert kept == kv.nbytes
        return
    # Nodes above the pages are computed from theirs when they are asked for, and kept beside them.
    for level in (1, 2):
        for what in kinds:
            kv.summary(what, PAGE * 16**level)
    nodes = sum(tensor.nbytes for tensor in kv.blocks.asked.values())
    assert kept == pytest.approx(kv.nbytes + nodes, rel=1e-3)


def test_pages_in_many_planes_are_read_in_order():
    kinds = make("tree").summaries
    k, v = tensors(5)
    kv = quantised("int8:residual=0,sinks=0", k, v, kinds=kinds)
    whole = kv.keys(0, LENGTH).clone()
    for page in range(1, 20, 2):  # twenty stretches, more than are read one by one
        kv.demote([page], "int2" if page % 4 == 1 else "int4", keep_exact=True)
    found = kv.keys(0, LENGTH)
    for page in range(21):
        part = slice(page * PAGE, min((page + 1) * PAGE, LENGTH))
        assert torch.equal(found[:, :, part], kv.keys(part.start, part.stop))
        assert torch.equal(found[:, :, part], whole[:, :, part]) == (page % 2 == 0 or page == 20)
        error = float((found[:, :, part] - k[:, :, part]).norm() / k[:, :, part].norm())
        assert error < 0.4
    kv.promote(range(1, 20, 2))
    assert torch.equal(kv.keys(0, LENGTH), whole)
