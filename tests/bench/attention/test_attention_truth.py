"""What outputs are checked against agrees with the mechanisms, with autograd, and with floors that are counted."""

import dataclasses
import itertools
import math

import pytest
import torch

from longspan.attention import attend, parse
from longspan.bench.attention import checks, floors, inputs, sides, truth
from longspan.bench.timing import Peaks
from longspan.errors import UsageError
from longspan.kv.base import TensorKV

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SPECS = [
    "dense",
    "superlinear:window=40",
    "superlinear:window=40,gate=routed",
    "superlinear:window=40,gate=routed,share=group,spans=2",
    "superlinear:window=70,share=group,summary=bounds,sinks=3",
    "superlinear:window=70,gate=routed,summary=bounds,spans=2",
    "superlinear:window=33,power=0.55,span_power=0.55,sinks=4,backward=0.7,forward=0.4",
    "superlinear:window=33,gate=routed,sinks=3,spans=9,backward=0",
    "superlinear:spans=0,window=20",
]


def made(length=448, queries=129, routing="random", dtype=torch.float64, heads=6, kv_heads=2, window=40):
    shape = inputs.Shape(heads, kv_heads, 16, dtype, CPU, window)
    return inputs.make(shape, length, queries, routing, 3)[0]


@pytest.mark.parametrize("routing", inputs.ROUTINGS)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_those_of_the_mechanism(spec, routing):
    given, mechanism = made(routing=routing), parse(spec)
    rows = checks.rows_of(6, 129, 40, 0)
    wanted, sure = truth.attended(mechanism, given, rows)
    out = attend(given.q, given.k, given.v, mechanism)
    found = torch.stack([out[0, row.head, row.query] for row in rows])
    assert sure.sum() > 30
    torch.testing.assert_close(found[sure], wanted[sure], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length,queries", [(64, 64), (64, 1), (128, 3)])
def test_short_contexts_too(length, queries):
    given, mechanism = made(length, queries), parse("superlinear:window=20,gate=routed")
    rows = [truth.Row(head, query) for head in range(6) for query in range(queries)]
    wanted, _ = truth.attended(mechanism, given, rows)
    out = attend(given.q, given.k, given.v, mechanism)[0]
    torch.testing.assert_close(out, wanted.view(6, queries, 16), rtol=1e-9, atol=1e-11)


def test_dense_rows_do_not_depend_on_the_block(monkeypatch):
    given, rows = made(), checks.rows_of(6, 129, 12, 1)
    before, _ = truth.attended(parse("dense"), given, rows)
    monkeypatch.setattr(truth, "_BLOCK", 50)
    torch.testing.assert_close(truth.attended(parse("dense"), given, rows)[0], before, rtol=1e-12, atol=1e-13)


def test_a_near_tie_is_not_sure_and_an_exact_one_is():
    given = made(queries=1, dtype=torch.float32)
    mechanism = parse("superlinear:window=40,spans=1")
    row = truth.Row(0, 0)
    first, second = (truth.chosen(dataclasses.replace(mechanism, spans=n), given, row).anchors[-1] for n in (1, 2))
    assert truth.chosen(mechanism, given, row).sure
    given.k[0, 0, second] = given.k[0, 0, first] * (1 - 2e-6)
    assert not truth.chosen(mechanism, given, row).sure
    given.k[0, 0, second] = given.k[0, 0, first]
    tied = truth.chosen(mechanism, given, row)
    assert tied.sure and tied.anchors == max(first, second)


@pytest.mark.parametrize("spec", ["superlinear", "superlinear:power=0.55,span_power=0.55,window=2032"])
def test_the_newest_query_of_ten_million_tokens_chooses_the_same_spans(spec):
    length, mechanism = 10 << 20, parse(spec)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, length, 2, generator=generator)
    given = inputs.Inputs(torch.randn(1, 1, 1, 2, generator=generator), k, k)
    choice = truth.chosen(mechanism, given, truth.Row(0, 0))
    _, lo, hi = mechanism.search(given.q.double(), TensorKV(k, k), length - 1)
    assert choice.sure and choice.spans == tuple(zip(lo.flatten().tolist(), hi.flatten().tolist(), strict=True))
    assert choice.candidates == len(mechanism.anchors(length - 1)) > 3000 and len(choice.near) == mechanism.whole_window


def test_what_has_no_equation_here_is_refused():
    with pytest.raises(UsageError, match="can't be checked here: use one of dense, superlinear"):
        truth.checked(parse("quest"))
    assert truth.checked(parse("superlinear:gate=routed")).name == "superlinear"


def test_every_option_of_superlinear_is_known():
    assert set(type(parse("superlinear")).options()) <= truth._OPTIONS


def test_rows_hold_the_edges_and_every_head():
    rows = checks.rows_of(8, 4096, 32, 0)
    assert {row.head for row in rows} == set(range(8)) and len(rows) >= 30
    assert {0, 1, 63, 64, 4095, 4094, 4032, 4031} <= {row.query for row in rows}
    assert checks.rows_of(4, 1, 32, 0) and {row.query for row in checks.rows_of(4, 1, 32, 0)} == {0}
    assert checks.rows_of(8, 4096, 32, 0) == rows != checks.rows_of(8, 4096, 32, 1)


@pytest.mark.parametrize("routing,least,most", [("trained", 0.6, 1.0), ("random", 0.0, 0.3)])
def test_trained_queries_read_what_their_neighbours_read(routing, least, most):
    mechanism, shape = parse("superlinear:window=64"), inputs.Shape(2, 1, 128, torch.float32, CPU, 64)
    (given,) = inputs.make(shape, 8192, 64, routing, 3)
    choices = [truth.chosen(mechanism, given, truth.Row(0, query)) for query in range(64)]
    read = [{key for lo, hi in choice.spans for key in range(lo, hi + 1)} for choice in choices]
    shared = [len(one & other) / len(one | other) for one, other in itertools.pairwise(read)]
    assert least <= sum(shared) / len(shared) <= most


def test_sets_share_the_keys_of_long_contexts_alone():
    shape = inputs.Shape(2, 1, 8, torch.float32, CPU, 64)
    short = inputs.make(shape, 128, 1, "random", 0, sets=3)
    assert len({one.k.data_ptr() for one in short}) == 3
    assert len({float(one.q[0, 0, 0, 0]) for one in short}) == 3
    again = inputs.make(shape, 128, 1, "random", 0, sets=3)
    assert all(torch.equal(a.q, b.q) and torch.equal(a.v, b.v) for a, b in zip(short, again, strict=True))


def test_long_contexts_are_made_once(monkeypatch):
    monkeypatch.setattr(inputs, "_ROTATED_BYTES", 1000)
    shape = inputs.Shape(2, 1, 8, torch.float32, CPU, 64)
    made_of = {length: inputs.make(shape, length, 1, "random", 0, sets=5) for length in (8, 24, 64)}
    counts = {length: len({one.k.data_ptr() for one in sets}) for length, sets in made_of.items()}
    assert counts == {8: 2, 24: 2, 64: 1}  # 512, 1536 and 4096 bytes


def test_floors_of_decode_count_the_keys_that_are_chosen():
    given, mechanism = made(queries=1, dtype=torch.float32), parse("superlinear:window=40")
    found = floors.of(mechanism, given)
    together, apart, anchors = 0, 0, 0
    for head in range(2):
        reads = set()
        for one in range(3 * head, 3 * head + 3):
            choice = truth.chosen(mechanism, given, truth.Row(one, 0))
            own = [set(choice.near.tolist()), *(set(range(lo, hi + 1)) for lo, hi in choice.spans)]
            reads |= set.union(*own)
            apart += sum(map(len, own[1:]))
        apart += 48
        together += len(reads)
        anchors += choice.candidates
    ends, token = 2 * 6 * 16 * 4, 2 * 16 * 4
    assert anchors == 2 * (math.isqrt(448) - 6)
    assert found.bytes == together * token + anchors * token // 2 + ends
    assert found.bytes_apart == apart * token + anchors * token // 2 + ends
    assert found.bytes < min(found.bytes_apart, floors.of(parse("dense"), given).bytes)


def test_floors_of_prefill_count_multiplications():
    given = made(queries=2, dtype=torch.float32)
    dense = floors.of(parse("dense"), given)
    assert dense.flops == 4 * 16 * 6 * (447 + 448)
    none = floors.of(parse("superlinear:window=48,spans=0"), given)
    anchors = sum(math.isqrt(n) - 6 for n in (447, 448))
    assert none.flops == 6 * 16 * (4 * 2 * 48 + 2 * anchors)
    assert dense.seconds(Peaks(1e30, dense.flops)) == 1 and dense.seconds(Peaks(dense.bytes, 1e30)) == 1


@pytest.mark.parametrize("spec", ["dense", "superlinear:window=40", "superlinear:window=40,gate=routed"])
def test_gradients_of_our_side_are_the_truths(spec):
    side = sides.Ours(parse(spec))
    found = checks.gradients(side, made(256, 65, dtype=torch.float32), checks.rows_of(6, 65, 12, 0), 0)
    assert found.rows >= 10 and found.error < 1e-4


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_wrong_gradient_is_refused(which, monkeypatch):
    side, given = sides.Ours(parse("dense")), made(256, 65, dtype=torch.float32)

    def prefill(leaves):
        wrong = dataclasses.replace(leaves, **{which: getattr(leaves, which).detach()})
        return lambda: attend(wrong.q, wrong.k, wrong.v, "dense") + 0 * getattr(leaves, which).sum()

    monkeypatch.setattr(side, "prefill", prefill)
    with pytest.raises(checks.WrongOutputError, match="gradient differs"):
        checks.gradients(side, given, checks.rows_of(6, 65, 12, 0), 0)
    monkeypatch.setattr(side, "prefill", lambda leaves: lambda: torch.zeros_like(leaves.q, requires_grad=False))
    with pytest.raises(checks.WrongOutputError, match="gives no gradients"):
        checks.gradients(side, given, checks.rows_of(6, 65, 12, 0), 0)


def test_cudnn_parts_are_merged_to_dense(monkeypatch):
    """cuDNN itself runs on a GPU alone: here its two calls are plain ones that give the same pair."""

    def plain(q, k, v, *, causal):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
        lse = torch.logsumexp(scores, -1, keepdim=True)
        return torch.exp(scores - lse) @ v, lse

    monkeypatch.setattr(sides, "_cudnn", plain)
    for length, queries in ((448, 129), (128, 128)):
        given = made(length, queries)
        out = sides.Cudnn().prefill(given)()
        torch.testing.assert_close(out, attend(given.q, given.k, given.v, "dense"), rtol=1e-9, atol=1e-11)
