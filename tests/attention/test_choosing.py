"""What choosing mechanisms share: who chooses, budgets, positions on both sides of the trained length, poison."""

from dataclasses import dataclass
from typing import ClassVar

import plain
import pytest
import torch

from longspan import attend
from longspan.attention import Shape, indexed, make
from longspan.attention.base import Hints
from longspan.attention.quest import Quest
from longspan.errors import UsageError
from longspan.kv.base import PAGE, SUMMARIES, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
INV_FREQ = 100.0 ** (-torch.arange(6, dtype=torch.float64) / 6)  # 12 of 16 channels are rotated
TRAINED = 200
CHOOSERS = [
    ("quest", dict(budget=112, window=17, sinks=3, who="head")),
    ("quest", dict(budget=96, window=30, sinks=0, who="layer")),
    ("quest", dict(budget=160, window=20, sinks=3, who="model")),
    ("sparq", dict(budget=100, window=17, sinks=3, who="head", channels=5, block=4)),
    ("sparq", dict(budget=80, window=30, sinks=0, who="layer", channels=7, block=2)),
    ("sparse", dict(window=25, sinks=5, density=1.3)),
]
IDS = ["head", "layer", "model", "sparq", "sparq-layer", "sparse"]
PAGES = (2, 0, 4)
LAYER = Hints(chosen_pages=PAGES, layer=7)


@dataclass(frozen=True)
class Wide(Quest):
    """Quest with pages of 64."""

    block: ClassVar[int] = 64


def inputs(seed, queries, keys, group=3, dtype=torch.float64, kv_heads=2, batch=1):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((kv_heads * group, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(batch, *shape, 16, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def expected(name, options, q, k, v, **rotary):
    if name == "sparse":
        return plain.sparse(q, k, v, **options, **rotary)
    return plain.quest(q, k, v, **options, chosen_pages=PAGES, **rotary)


def close(found, truth, tolerance=1e-10):
    torch.testing.assert_close(found.double(), truth.double(), atol=tolerance, rtol=tolerance)


def keys_read(mechanism, q, k, hints=LAYER):
    """Which keys each KV head's queries read in all, bool [Hkv, N]: those whose value's gradient is not zero."""
    v = torch.randn_like(k).requires_grad_()
    mechanism.attend(q, TensorKV(k, v), hints=hints).sum().backward()
    return (v.grad != 0).any(-1)[0]


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
@pytest.mark.parametrize("queries,keys", [(1, 150), (40, 190), (1, 351), (70, 240)])
@pytest.mark.parametrize("trained", [TRAINED, None])
def test_positions_on_both_sides_of_the_trained_length(name, options, queries, keys, trained):
    q, k, v = inputs(1, queries, keys)
    out = make(name, **options).attend(q, TensorKV(k, v, Rotary(INV_FREQ, trained)), hints=LAYER)
    close(out, expected(name, options, q, k, v, inv_freq=INV_FREQ, trained=trained))
    unaware = expected(name, options, q, k, v)
    assert not torch.allclose(out, unaware, atol=1e-3), "positions must matter"


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
def test_tiles_and_chunks_do_not_matter_across_the_trained_length(name, options, monkeypatch):
    q, k, v = inputs(2, 260, 260)
    mechanism, rotary = make(name, **options), Rotary(INV_FREQ, TRAINED)
    whole = mechanism.attend(q, TensorKV(k, v, rotary), hints=LAYER)
    parts, done = [], 0
    for step in (64, 130, 1, 4, 1, 1, 59):
        kv = TensorKV(k[:, :, : done + step], v[:, :, : done + step], rotary)
        parts.append(mechanism.attend(q[:, :, done : done + step], kv, hints=LAYER))
        done += step
    close(torch.cat(parts, 2), whole)
    for tile in (1, 7, 300):
        monkeypatch.setattr(type(mechanism), "tile", tile)
        close(mechanism.attend(q, TensorKV(k, v, rotary), hints=LAYER), whole)


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_a_mask_and_gathering_read_the_same(name, options, dtype, tolerance, monkeypatch):
    q, k, v = inputs(3, 90, 420, dtype=dtype, batch=2)
    mechanism, outs = make(name, **options), []
    with torch.inference_mode():
        for masked, gathered in ((10**6, 1), (0, 1), (0, 10**5), (0, 10**9)):
            monkeypatch.setattr(indexed, "_MASKED", masked)
            monkeypatch.setitem(indexed._GATHERED, "cpu", gathered)
            outs.append(mechanism.attend(q, TensorKV(k, v, Rotary(INV_FREQ)), hints=LAYER))
    close(outs[0], expected(name, options, q, k, v, inv_freq=INV_FREQ), tolerance)
    for out in outs[1:]:
        close(out, outs[0], tolerance)


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
@pytest.mark.parametrize("group", [1, 3, 16])
def test_decode_in_float32_and_bfloat16_without_gradients(name, options, group):
    """The fast kernel serves only here."""
    for seed, dtype, tolerance in ((4, torch.float32, 2e-5), (5, torch.bfloat16, 1.6e-2)):
        q, k, v = inputs(seed, 1, 333, group, dtype)
        with torch.inference_mode():
            out = attend(q, k, v, name, chosen_pages=PAGES, **options)
        assert out.dtype == dtype
        close(out, expected(name, options, q, k, v), tolerance)


@pytest.mark.parametrize("name", ["quest", "sparse"])
@pytest.mark.parametrize("queries", [1, 90])
def test_everything_selected_is_dense_with_rotary(name, queries):
    q, k, v = inputs(6, queries, TRAINED)
    options = dict(budget=500, window=1) if name == "quest" else dict(density=100.0, window=1, sinks=0)
    rotary = Rotary(INV_FREQ, TRAINED)
    truth = make("dense").attend(q, TensorKV(k, v, rotary))
    close(make(name, **options).attend(q, TensorKV(k, v, rotary), hints=LAYER), truth)
    # Beyond the trained length nothing lies between chosen keys and window either: compact positions are the true ones.
    short = Rotary(INV_FREQ, 50)
    close(make(name, **options).attend(q, TensorKV(k, v, short), hints=LAYER), truth)


@pytest.mark.parametrize("name", ["quest", "sparse"])
def test_the_first_layers_are_dense_up_to_the_trained_length(name):
    q, k, v = inputs(7, 60, 230)
    mechanism = make(name, window=16, dense_layers=2, **(dict(budget=64) if name == "quest" else {}))
    dense, chosen = attend(q, k, v, "dense"), attend(q, k, v, mechanism)
    assert not torch.allclose(dense, chosen, atol=1e-3)
    for layer, truth in ((0, dense), (1, dense), (2, chosen), (None, chosen)):
        close(attend(q, k, v, mechanism, layer=layer), truth)
    # Beyond it no positions are known at which everything could be read.
    for trained, layer in ((TRAINED, 1), (TRAINED, 2), (None, 1)):
        kv = TensorKV(k, v, Rotary(INV_FREQ, trained))
        far = mechanism.attend(q, kv, hints=Hints(layer=9))
        close_by = make("dense").attend(q, kv)
        out = mechanism.attend(q, kv, hints=Hints(layer=layer))
        own = TRAINED - 170 if trained else 60  # of the 60 queries
        close(out[:, :, :own], (close_by if layer < 2 else far)[:, :, :own])
        close(out[:, :, own:], far[:, :, own:])


def test_who_chooses():
    q, k, _ = inputs(8, 1, 700)
    options = dict(budget=144, window=16, sinks=4)
    by_head = keys_read(make("quest", who="head", **options), q, k)
    by_layer = keys_read(make("quest", who="layer", **options), q, k)
    by_model = keys_read(make("quest", who="model", **options), q, k)
    assert (by_head[0] != by_head[1]).any()
    assert (by_layer[0] == by_layer[1]).all() and (by_layer[0] != by_head[0]).any()
    wanted = torch.zeros(700, dtype=torch.bool)
    wanted[:16] = wanted[128:192] = wanted[700 - 16 - 12 :] = True  # sinks, page 2, and the window from a block's start
    wanted[16:48] = True  # the budget is full after two more blocks of page 0
    assert (by_model == wanted).all()
    unasked = keys_read(make("quest", who="model", **options), q, k, Hints(layer=9))
    wanted[16:680] = False
    wanted[700 - 16 - 12 :] = True
    assert (unasked == wanted).all(), "without chosen pages: sinks and window"


def test_the_page_that_holds_the_key_is_found():
    """What the budget is for: one key among 5000 that answers the query; a static pattern passes it by."""
    q, k, v = inputs(9, 1, 5000, kv_heads=1)
    k[0, 0, 1234] = 4 * q[0].mean(0)[0] / q[0].mean(0)[0].norm() * 4
    v[0, 0, 1234] = 1000.0
    with torch.no_grad():
        dense = attend(q, k, v, "dense")
        found, missed = attend(q, k, v, "quest", budget=128, window=16), attend(q, k, v, "sparse", window=16)
    assert (dense[0] > 20).any(1).any()
    assert (found >= dense * 0.99).all() and missed.abs().max() < 10


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
@pytest.mark.parametrize("rotary", [None, TRAINED, 10**6])
def test_unselected_keys_and_values_are_never_read(name, options, rotary):
    """Poisoned after their summaries were computed, as pages that moved to a slower tier would be."""
    q, k, v = inputs(10, 1, 500, dtype=torch.float32)
    mechanism = make(name, **options)
    rotary = rotary and Rotary(INV_FREQ, rotary)
    grad = v.clone().requires_grad_()
    mechanism.attend(q, TensorKV(k, grad, rotary), hints=LAYER).sum().backward()
    unread = (grad.grad == 0).all(-1)
    assert unread.any()
    for no_grad in (False, True):
        spoiled = TensorKV(k.clone(), v.clone(), rotary)
        for what in SUMMARIES:
            spoiled.summary(what, 16)
        if name != "sparq":  # which scores every key
            spoiled.keys(0, 500)[unread] = float("nan")
        spoiled.values(0, 500)[unread] = float("nan")
        with torch.inference_mode(no_grad):
            clean = mechanism.attend(q, TensorKV(k, v, rotary), hints=LAYER)
            close(mechanism.attend(q, spoiled, hints=LAYER), clean, 2e-6)
        spoiled.keys(0, 500)[:, :, 499] = float("nan")
        assert mechanism.attend(q, spoiled, hints=LAYER).isnan().all(), "NaN that is read must show"


@pytest.mark.parametrize("name,options", CHOOSERS, ids=IDS)
def test_pages_in_any_order_and_poisoned_slots(name, options):
    q, k, v = inputs(11, 30, 520)
    mechanism = make(name, **options)
    for trained in (None, TRAINED):
        rotary = Rotary(INV_FREQ, trained)
        pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"))
        pool.reserve(14)
        pool.keys.fill_(float("nan"))
        pool.values.fill_(float("nan"))
        pool._free = torch.randperm(14, generator=torch.Generator().manual_seed(12)).tolist()
        kv, done, parts = PagedKV(pool, rotary), 490, []
        kv.append(k[:, :, :done], v[:, :, :done])
        for step in (1, 1, 20, 1, 7):
            kv.append(k[:, :, done : done + step], v[:, :, done : done + step])
            parts.append(mechanism.attend(q[:, :, done - 490 : done - 490 + step], kv, hints=LAYER))
            done += step
        assert kv.table != sorted(kv.table)
        close(torch.cat(parts, 2), mechanism.attend(q, TensorKV(k, v, rotary), hints=LAYER))


def test_pages_that_cannot_be_read_exactly_are_not_chosen():
    class Coarse(TensorKV):
        def readable(self):
            return torch.arange(-(-self.length // PAGE)) % 2 == 0

    for queries in (1, 20):
        q, k, v = inputs(13, queries, 700)
        v = v.requires_grad_()
        mechanism = make("quest", budget=500, window=16)
        mechanism.attend(q, Coarse(k, v), hints=LAYER).sum().backward()
        read = (v.grad != 0).any(-1)[0, 0]
        coarse = torch.arange(700) // PAGE % 2 == 1
        assert not read[:640][coarse[:640]].any() and read[:640][~coarse[:640]].sum() >= 300


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("who", ["head", "layer", "model"])
def test_blocks_of_a_page(who, group):
    q, k, v = inputs(14, 33, 400, group)
    options = dict(budget=260, window=20, sinks=3, who=who)
    out = Wide(**options).attend(q, TensorKV(k, v), hints=LAYER)
    close(out, plain.quest(q, k, v, **options, chosen_pages=PAGES, block=64))


def test_within_a_budget():
    n = 4000
    q, k, _ = inputs(15, 1, n, group=1, kv_heads=1)
    for keys in (64, 65, 100, 128, 200, 256, 511, 1000, 3000, 5000):
        for mechanism in (make("quest"), make("quest", who="layer", window=500, sinks=40), make("sparse")):
            within = mechanism.within(keys, n)
            read = int(keys_read(within, q, k).sum())
            assert 0.6 * min(keys, n) <= read <= keys, within
        # A page of 64 beside the window and the sinks' page: three pages at least.
        wide = int(keys_read(Wide().within(keys, n), q, k).sum())
        assert 0.4 * min(keys, n) <= wide <= max(keys, keys // 4 + 63 + 128)
    for mechanism in (make("quest"), make("sparse"), Wide()):
        assert all(mechanism.within(keys, n) for keys in range(64, 700))
        with pytest.raises(UsageError, match="at least 64"):
            mechanism.within(63, n)
    assert make("quest").within(1024, n) == make("quest", budget=1024)


def test_the_stride_grows_with_the_position_alone():
    for density in (1.0, 0.3, 2.7):
        sparse = make("sparse", window=40, sinks=3, density=density)
        for t in (0, 1, 39, 40, 41, 99, 100, 255, 256, 1000, 3000):
            index, valid = sparse.far_keys(t, 1)
            far = [j for j in plain.sparse_keys(t, 40, 3, density) if j <= t - 40]
            assert index[0].tolist() == far and valid is None
        index, valid = sparse.far_keys(30, 300)
        for i in range(300):
            row = index[i] if valid is None else index[i][valid[i]]
            assert row.tolist() == [j for j in plain.sparse_keys(30 + i, 40, 3, density) if j <= 30 + i - 40]
    assert make("sparse").stride(10**14 - 1) == 10**7


def test_costs_are_what_is_read():
    shape, n = Shape(6, 2, 16, 16, 4.0), 5000
    q, k, _ = inputs(16, 1, n)
    for who, per_block in (("head", 2), ("layer", 2), ("model", 0)):
        mechanism = make("quest", budget=1024, who=who)
        cost = mechanism.cost(n, shape)
        summaries = (n - 128) // 16 * per_block
        keys = cost.decode_keys - summaries
        pages = Hints(chosen_pages=tuple(range(60)), layer=9)
        read = int(keys_read(mechanism, q, k, pages)[0].sum())
        assert read <= keys <= read + 15 and keys <= 1024, "the window ends where a block begins"
        assert cost.decode_flops == 2 * 6 * (keys * 32 + summaries * 16)
        assert cost.decode_bytes == 2 * 4 * (keys * 32 + summaries * 16)
        kept = {"head": 4, "layer": 4, "model": 0}[who]
        assert cost.kept_bytes == 2 * 4 * (n * 32 + n // 16 * 16 * kept)
        assert cost.prefill_flops == pytest.approx(
            sum(mechanism.cost(t + 1, shape).decode_flops for t in range(n)), rel=0.01
        )
    for mechanism in (make("sparse"), make("sparse", density=3.0), make("sparse").within(600, n)):
        cost = mechanism.cost(n, shape)
        assert cost.decode_keys == pytest.approx(int(keys_read(mechanism, q, k)[0].sum()), rel=0.01)
        assert cost.prefill_flops == pytest.approx(
            sum(mechanism.cost(t + 1, shape).decode_flops for t in range(n)), rel=0.01
        )
    assert make("quest", who="model", budget=1024).wanted_pages == 14 and make("quest").wanted_pages == 0


@pytest.mark.parametrize(
    "name,options",
    [
        ("quest", dict(budget=63)), ("quest", dict(budget=100, window=97)), ("quest", dict(window=0)),
        ("sparq", dict(block=3)), ("sparq", dict(channels=0)),
        ("quest", dict(sinks=-1)), ("quest", dict(dense_layers=-1)), ("quest", dict(who="everyone")),
        ("sparse", dict(window=0)), ("sparse", dict(sinks=-1)), ("sparse", dict(density=0.0)),
        ("sparse", dict(density=float("nan"))), ("sparse", dict(density=float("inf"))),
        ("sparse", dict(dense_layers=-1)),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(UsageError) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)
