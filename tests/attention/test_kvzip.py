"""kvzip against its equation, a query at a time, and that a repetition leaves nothing but scores behind."""

import math

import pytest
import torch
from plain import rotated

from longspan.attention import make
from longspan.errors import UsageError
from longspan.kv.kept import KeptKV
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
TURNING = Rotary(1.0 / 50 ** (torch.arange(4) / 4))


def inputs(seed, keys, group, kv_heads=2, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    q = 1.5 * torch.randn(1, kv_heads * group, keys, 8, generator=gen, dtype=torch.float64)
    k, v = (torch.randn(1, kv_heads, keys, 8, generator=gen, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def layer_for(k, turning, heads="same", kv_format=None):
    return KeptKV(k.shape[1], 8, 8, k.dtype, k.device, turning, kv_format=kv_format, apart=heads != "same")


def append(mechanism, layer, q, k, v, **how):
    layer.append(k, v)
    return mechanism.attend_kept(q, layer, scale=8**-0.5, learn=True, decode=False, **how)


def repeated(mechanism, layer, context, pieces):
    """Read a context, and have it repeated in pieces."""
    append(mechanism, layer, *context)
    layer.commit()
    length = layer.length
    for piece in pieces:
        append(mechanism, layer, *piece, repeat=True)
        layer.take_back(length)
    return layer


def plainly(context, pieces, turning):
    """The most attention that any query of a piece gives each of the context's keys, a list of n numbers a KV head."""
    _, k, _ = (x[0].double() for x in context)
    heads, n = k.shape[:2]
    most = [[0.0] * n for _ in range(heads)]
    for q, own, _ in ((x[0].double() for x in piece) for piece in pieces):
        group = q.shape[0] // heads
        for g in range(q.shape[0]):
            keys = torch.cat([k[g // group], own[g // group]])
            if turning is not None:
                keys = rotated(keys, range(len(keys)), turning.inv_freq)
            for t in range(q.shape[1]):
                one = q[g, t : t + 1]
                query = one[0] if turning is None else rotated(one, [n + t], turning.inv_freq)[0]
                weights = torch.softmax(keys[: n + t + 1] @ query / math.sqrt(8), 0).tolist()
                most[g // group] = [max(a, b) for a, b in zip(most[g // group], weights, strict=False)]
    return most


@pytest.mark.parametrize("group,n,sizes", [(1, 61, (33, 20, 7)), (3, 70, (70,)), (16, 33, (1, 32))])
@pytest.mark.parametrize("turning", [None, TURNING])
def test_follows_its_equation(group, n, sizes, turning):
    mechanism = make("kvzip", budget=20, window=3, sinks=2, heads="same")
    context, pieces = inputs(1, n, group), [inputs(2 + i, size, group) for i, size in enumerate(sizes)]
    layer = repeated(mechanism, layer_for(context[1], turning), context, pieces)
    (rows,) = layer.groups
    wanted = torch.tensor(plainly(context, pieces, turning), dtype=torch.float64)
    found = mechanism.scores(rows, True)
    torch.testing.assert_close(found.double(), wanted, atol=0, rtol=2.0**-8)  # what is learned is a bfloat16
    mechanism.evict(layer, 20)
    for head, held in enumerate(rows.positions().tolist()):
        sure = {0, 1, *range(n - 3, n)}
        rest = sorted(set(range(n)) - sure, key=lambda i: -float(found[head, i]))
        assert held == sorted([*sure, *rest[:15]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["same", "adaptive", "model"])
def test_nothing_of_a_repetition_stays_but_the_scores(dtype, heads):
    mechanism = make("kvzip", budget=200, heads=heads)
    context, ask = inputs(1, 90, 3, dtype=dtype), inputs(7, 5, 3, dtype=dtype)
    plain = repeated(mechanism, layer_for(context[1], TURNING, heads), context, [])
    layer = repeated(mechanism, layer_for(context[1], TURNING, heads), context, [inputs(5, 70, 3, dtype=dtype)])
    assert layer.length == layer.held == 90 and layer.page_bytes == plain.page_bytes
    for a, b in zip(layer.groups, plain.groups, strict=True):
        assert torch.equal(a.pages.keys(0, 90), b.pages.keys(0, 90)) and a.committed == 90
        assert a.learned.rows["most"].shape[1] == 90 and not b.learned.rows
    outs = [append(mechanism, each, *ask) for each in (layer, plain)]
    assert torch.equal(*outs)


def test_what_was_learned_goes_with_its_rows_and_later_repetitions_add_to_it():
    mechanism = make("kvzip", budget=40, window=2, sinks=1, heads="same")
    context = inputs(1, 80, 2)
    layer = repeated(mechanism, layer_for(context[1], None), context, [inputs(2, 50, 2)])
    (rows,) = layer.groups
    before, held = mechanism.scores(rows, True), None
    mechanism.evict(layer, 40)
    held = rows.positions()
    assert torch.equal(mechanism.scores(rows, True), before.gather(1, held))
    newer = inputs(3, 10, 2)
    append(mechanism, layer, *newer)
    layer.commit()
    assert torch.equal(mechanism.scores(rows, True)[:, 40:], torch.full((2, 10), math.inf)), "not repeated yet"
    append(mechanism, layer, *inputs(4, 12, 2), repeat=True)
    layer.take_back(90)
    after = mechanism.scores(rows, True)
    assert (after[:, :40] >= before.gather(1, held)).all() and after[:, 40:].isfinite().all()


def test_heads_of_all_layers_share_one_budget_as_the_paper_has_it():
    mechanism = make("kvzip", budget=24, window=3, sinks=2)
    layers = []
    for seed in (1, 2, 3):
        context = inputs(seed, 70, 2)
        layers.append(repeated(mechanism, layer_for(context[1], TURNING, "model"), context, [inputs(10 * seed, 40, 2)]))
    found = [mechanism.scores(rows, True)[0].tolist() for kv in layers for rows in kv.groups]
    mechanism.evict_all(layers, 24)
    # One list of all rows of all heads of all layers: the first and the newest are sure, the best of the others stay.
    rows = [(head, row) for head in range(6) for row in range(70)]
    sure = {(head, row) for head, row in rows if row < 2 or row >= 67}
    rest = sorted((each for each in rows if each not in sure), key=lambda each: (-found[each[0]][each[1]], each))
    wanted = sure | set(rest[: 24 * 6 - len(sure)])
    held = {
        (head, row)
        for head, rows in enumerate(rows for kv in layers for rows in kv.groups)
        for row in rows.positions()[0].tolist()
    }
    assert held == wanted and len({kv.total for kv in layers}) > 1, "layers differ"


@pytest.mark.parametrize("options", [dict(every=64), dict(when="question")])
def test_options_that_there_is_no_repetition_for_are_refused(options):
    with pytest.raises(UsageError, match="leave out every and when"):
        make("kvzip", **options)
