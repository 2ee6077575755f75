"""What evicts, against its papers' equations, and the identities that every mechanism that evicts must satisfy."""

import math

import plain
import plain_evicting
import pytest
import torch

from longspan import attend
from longspan.attention import make, mechanisms
from longspan.attention.base import Shape
from longspan.attention.keeping import rows_to_keep
from longspan.errors import UsageError
from longspan.kv.base import PAGE, TensorKV
from longspan.kv.kept import KeptKV
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name, cls in mechanisms().items() if cls.evicts]
CASES = [
    ("h2o", dict(budget=24, window=9, sinks=2, every=16)),
    ("h2o", dict(budget=20, window=0, sinks=0, every=7)),
    ("snapkv", dict(budget=24, window=8, sinks=3, every=17, kernel=5)),
    ("snapkv", dict(budget=30, window=5, sinks=0, every=40, kernel=1)),
    ("rocketkv", dict(budget=12, window=8, sinks=1, every=33, kernel=9)),
    ("expected", dict(budget=24, window=3, sinks=4, every=16, future=7, epsilon=0.02)),
    ("expected", dict(budget=31, window=0, sinks=0, every=50, future=20)),
    ("keydiff", dict(budget=24, window=4, sinks=4, every=16)),
    ("keydiff", dict(budget=9, window=0, sinks=0, every=64)),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


def inputs(seed, keys, group, dtype=torch.float64, kv_heads=2, dim=8, batch=1):
    gen = torch.Generator().manual_seed(seed)
    q = 1.5 * torch.randn(batch, kv_heads * group, keys, dim, generator=gen, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rotary(trained=None):
    return Rotary(1.0 / 50 ** (torch.arange(4) / 4), trained)


def plainly(name, q, k, v, options, **positions):
    given = {key: value for key, value in options.items() if key != "heads"}
    if name in ("snapkv", "rocketkv"):
        given["observed"] = options["window"]
    return plain_evicting.simulate(name, q, k, v, same=options.get("heads", "same") == "same", **given, **positions)


def layer_for(name, k, options=None, turning=None, dtype=None, **given):
    mechanism = make(name, **(options or {}))
    return mechanism, KeptKV(
        k.shape[1],
        k.shape[3],
        k.shape[3],
        dtype or k.dtype,
        k.device,
        turning,
        apart=mechanism.apart,
        **given,
    )


def read(mechanism, layer, q, k, v, start, stop, learn=True):
    """Read the tokens `start .. stop - 1`, for good or not."""
    layer.append(k[:, :, start:stop], v[:, :, start:stop])
    out = mechanism.attend_kept(
        q[:, :, start:stop], layer, scale=q.shape[-1] ** -0.5, learn=learn, decode=not learn and stop - start == 1
    )
    if learn:
        layer.commit()
    return out


def tokens_held(layer):
    return [row for group in layer.groups for row in group.positions().tolist()]


# --- the equations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,options", [*CASES, ("h2o", dict(budget=20, window=5, every=1))])
@pytest.mark.parametrize("keys,queries,group,batch", [(81, 81, 1, 1), (70, 33, 3, 2)])
def test_follows_its_equations(name, options, keys, queries, group, batch):
    q, k, v = inputs(1, keys, group, batch=batch)
    out = attend(q[:, :, keys - queries :], k, v, name, **options)
    for b in range(batch):
        wanted, _ = plainly(name, q[b], k[b], v[b], options, first=keys - queries)
        torch.testing.assert_close(out[b], wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
@pytest.mark.parametrize("heads,trained", [("same", None), ("same", 60), ("adaptive", 60)])
def test_positions_are_true_up_to_the_trained_length_and_compact_beyond(name, options, heads, trained):
    options = {**options, "heads": heads}
    q, k, v = inputs(2, 83, 2)
    turning = rotary(trained)
    out = make(name, **options).attend(q, TensorKV(k, v, turning))
    wanted, _ = plainly(name, q[0], k[0], v[0], options, inv_freq=turning.inv_freq, trained=trained)
    torch.testing.assert_close(out[0], wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float_type_and_sixteen_heads_a_group(name, options, dtype):
    q, k, v = inputs(3, 59, 16, dtype, kv_heads=1)
    out = attend(q, k, v, name, **options)
    assert out.dtype == dtype
    wanted, _ = plainly(name, q[0], k[0], v[0], options)
    torch.testing.assert_close(out[0].double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("heads", ["same", "adaptive"])
@pytest.mark.parametrize("name,options", CASES, ids=IDS)
def test_read_in_chunks_it_keeps_what_it_keeps_when_read_at_once(name, options, heads):
    options = {**options, "every": 0, "heads": heads}
    q, k, v = inputs(4, 83, 3)
    turning = rotary(64)
    _, wanted = plainly(name, q[0], k[0], v[0], options, inv_freq=turning.inv_freq, trained=64)
    held, outs = [], []
    for stops in ([83], [1, 40, 41, 77, 83]):
        mechanism, layer = layer_for(name, k, options, turning)
        parts = [read(mechanism, layer, q, k, v, *ends) for ends in zip([0, *stops], stops, strict=False)]
        mechanism.evict(layer, mechanism.keeps(83))
        held.append(tokens_held(layer))
        outs.append(torch.cat(parts, 2))
    assert held[0] == held[1] == wanted
    torch.testing.assert_close(outs[0], outs[1], atol=1e-12, rtol=1e-12)
    # Before anything is evicted, every key is read, whatever its position.
    dense = plain.dense(rotated(q, turning), rotated(k, turning), v)
    torch.testing.assert_close(outs[0], dense, atol=1e-9, rtol=1e-9)


def rotated(x, turning):
    return turning.range(x, 0)


@pytest.mark.parametrize("keys,budget,group", [(130, 12, 1), (97, 40, 16), (61, 60, 3), (200, 13, 3)])
def test_rocketkv_reads_the_best_rows_in_decode(group, keys, budget):
    q, k, v = inputs(5, keys, group, kv_heads=1 if group == 16 else 2)
    out = attend(q[:, :, -1:], k, v, "rocketkv", budget=budget, window=3)
    wanted = plain_evicting.rocket_decode(q[0, :, -1], k[0], v[0], budget, keys - 1)
    torch.testing.assert_close(out[0, :, 0], wanted, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(out, attend(q[:, :, -1:], k, v, "dense"))


def test_rocketkv_decodes_from_what_it_kept_at_the_positions_where_it_is_read():
    for trained in (None, 64):
        q, k, v = inputs(6, 150, 3)
        turning = rotary(trained)
        mechanism, layer = layer_for("rocketkv", k, dict(budget=12, window=8, sinks=1, kernel=9), turning)
        for start, stop in ((0, 60), (60, 140)):
            read(mechanism, layer, q, k, v, start, stop)
        mechanism.evict(layer, mechanism.keeps(140))
        kept = layer.held
        assert kept == mechanism.keeps(140) < 140
        for t in (140, 141, 142):
            out = read(mechanism, layer, q, k, v, t, t + 1, learn=False)
            rows = []
            for h in range(2):
                tokens = tokens_held(layer)[h]
                places = tokens if trained is None else list(range(len(tokens)))
                rows.append(plain.rotated(k[0, h, tokens], places, turning.inv_freq))
            at = t if trained is None else kept + t - 140
            query = plain.rotated(q[0, :, t : t + 1], [at], turning.inv_freq)[:, 0]
            values = torch.stack([v[0, h, tokens_held(layer)[h]] for h in range(2)])
            wanted = plain_evicting.rocket_decode(query, torch.stack(rows), values, 12, kept)
            torch.testing.assert_close(out[0, :, 0], wanted, atol=1e-9, rtol=1e-9)


# --- identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", ["same", "adaptive"])
@pytest.mark.parametrize("queries,keys,group", [(1, 177, 3), (63, 190, 1), (129, 129, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_budget_for_everything_equals_dense(name, heads, queries, keys, group, dtype):
    q, k, v = inputs(7, keys, group, dtype)
    q = q[:, :, keys - queries :]
    every = {} if mechanisms()[name].repeats else {"every": 32}
    out = attend(q, k, v, name, budget=keys, window=20, heads=heads, **every)
    dense = attend(q, k, v, "dense")
    torch.testing.assert_close(out.double(), dense.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
def test_what_lies_in_the_future_never_changes_an_output(name, options):
    dtype = torch.float32
    q, k, v = inputs(8, 120, 3, dtype)
    clean = attend(q, k, v, name, **options)
    for t in (0, 15, 16, 100, 118):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, t + 1 :] = float("nan")
        poisoned_v[:, :, t + 1 :] = float("nan")
        out = attend(q, poisoned_k, poisoned_v, name, **options)
        torch.testing.assert_close(out[:, :, : t + 1], clean[:, :, : t + 1], atol=TOLERANCE[dtype], rtol=0)
        assert out[:, :, t + 1 :].isnan().any()


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
@pytest.mark.parametrize("heads", ["same", "adaptive"])
def test_what_was_evicted_never_changes_an_output(name, options, heads):
    q, k, v = inputs(9, 140, 3, torch.float32)
    outs = []
    for poison in (False, True):
        mechanism, layer = layer_for(name, k, {**options, "every": 0, "heads": heads}, rotary(100))
        read(mechanism, layer, q, k, v, 0, 120)
        mechanism.evict(layer, mechanism.keeps(120))
        if poison:
            for plane in layer.pool.planes:
                for what in ("k", "v"):
                    plane.tensors[what][:, plane.free_slots] = float("nan")
            for group in layer.groups:
                used = group.pages.table
                if group.held % PAGE:
                    layer.pool.keys[:, used[-1], group.held % PAGE :] = float("nan")
                    layer.pool.values[:, used[-1], group.held % PAGE :] = float("nan")
        outs.append(read(mechanism, layer, q, k, v, 120, 140, learn=False))
    assert outs[1].isfinite().all() and torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
def test_heads_that_share_their_budgets_keep_the_sum_and_their_safe_share(name, options):
    q, k, v = inputs(10, 160, 1, kv_heads=3)
    k[:, 1] *= 3  # a head whose attention is far from even
    mechanism, layer = layer_for(name, k, {**options, "every": 0, "heads": "adaptive", "safeguard": 0.5})
    read(mechanism, layer, q, k, v, 0, 160)
    keep = mechanism.keeps(160)
    mechanism.evict(layer, keep)
    held = [group.held for group in layer.groups]
    assert sum(held) == layer.total == 3 * keep < 3 * 160 and len(set(held)) > 1
    assert min(held) >= keep // 2
    assert layer.page_bytes == sum(-(-rows // PAGE) for rows in held) * layer.pool.native.page_bytes
    mechanism.evict(layer, keep)
    assert [group.held for group in layer.groups] == held, "there is nothing left to evict"
    mechanism.evict(layer, keep - 3, keep)
    assert max(group.held for group in layer.groups) <= keep
    assert layer.total == min(3 * (keep - 3), sum(min(rows, keep) for rows in held))


def test_the_best_rows_stay_and_the_older_of_equals():
    nan = float("nan")
    scores = torch.tensor([[0.0, 5, 1, 5, 5, 0, 9], [1, 2, 3, nan, 0, 0, 0]])
    kept = rows_to_keep([scores], 4, sinks=1, window=1)[0]
    assert kept.tolist() == [[0, 1, 3, 6], [0, 2, 3, 6]]
    # Of both heads' rest, the highest; each keeps at least the sinks, the window and half of the count.
    apart = rows_to_keep([scores[:1], scores[1:]], 4, sinks=1, window=1, safeguard=0.5)
    assert [one.tolist() for one in apart] == [[[0, 1, 3, 4, 6]], [[0, 3, 6]]]
    capped = rows_to_keep([scores[:1], scores[1:]], 4, sinks=1, window=1, safeguard=0.5, most=4)
    assert [one.shape[1] for one in capped] == [4, 4]
    rising = torch.arange(7.0).view(1, 7)
    assert rows_to_keep([rising], 3, sinks=0, window=0)[0].tolist() == [[4, 5, 6]]


# --- taking back, forks, what it says of itself -----------------------------------------------------------------


@pytest.mark.parametrize("heads", ["same", "adaptive"])
@pytest.mark.parametrize("name,options", CASES, ids=IDS)
def test_what_was_taken_back_or_not_read_for_good_leaves_no_trace(name, options, heads):
    q, k, v = inputs(11, 200, 3, torch.float32)
    mechanism, clean = layer_for(name, k, {**options, "every": 0, "heads": heads}, rotary(90))
    layer = layer_for(name, k, {"heads": heads}, rotary(90))[1]
    for one in (clean, layer):
        read(mechanism, one, q, k, v, 0, 100)
        mechanism.evict(one, mechanism.keeps(100))
        one.commit()
    # A question, a step of its answer, and a chunk of a document that was interrupted.
    read(mechanism, layer, q, k, v, 150, 180, learn=False)
    read(mechanism, layer, q, k, v, 180, 181, learn=False)
    layer.truncate(100)
    layer.append(k[:, :, 190:], v[:, :, 190:])
    mechanism.attend_kept(q[:, :, 190:], layer, scale=1.0, learn=True, decode=False)
    layer.truncate(100)
    fork = layer.fork()
    read(mechanism, fork, q, k, v, 130, 190)
    mechanism.evict(fork, mechanism.keeps(160))
    outs = []
    for one in (clean, layer):
        read(mechanism, one, q, k, v, 100, 150)
        mechanism.evict(one, mechanism.keeps(150))
        outs.append(read(mechanism, one, q, k, v, 150, 160, learn=False))
    assert tokens_held(clean) == tokens_held(layer) != tokens_held(fork)
    assert torch.equal(*outs)


@pytest.mark.parametrize("heads", ["same", "adaptive"])
@pytest.mark.parametrize("name,options", CASES, ids=IDS)
def test_a_fork_and_a_restored_layer_continue_exactly(name, options, heads):
    q, k, v = inputs(12, 200, 3, torch.float32)
    mechanism, layer = layer_for(name, k, {**options, "every": 0, "heads": heads}, rotary(150))
    read(mechanism, layer, q, k, v, 0, 100)
    mechanism.evict(layer, mechanism.keeps(100))
    read(mechanism, layer, q, k, v, 100, 130)
    again = layer_for(name, k, {"heads": heads}, rotary(150))[1]
    again.restore("3.", 130, layer.tensors("3."))
    outs = []
    for one in (layer.fork(), again, layer):
        read(mechanism, one, q, k, v, 130, 170)
        mechanism.evict(one, mechanism.keeps(170))
        outs.append((tokens_held(one), read(mechanism, one, q, k, v, 170, 180, learn=False)))
    for held, out in outs[1:]:
        assert held == outs[0][0]
        torch.testing.assert_close(out, outs[0][1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "spec,told",
    [
        (dict(name="h2o", budget=100), "window=1024 and sinks=4 need 1029"),
        (dict(name="snapkv", kernel=4), "kernel=4 has no middle"),
        (dict(name="snapkv", window=0), "window=0 is too small"),
        (dict(name="keydiff", heads="all"), "heads='?all'? is unknown: use one of same, adaptive, model"),
        (dict(name="keydiff", safeguard=1.5), "between 0 and 1"),
        (dict(name="expected", future=0), "future=0"),
        (dict(name="rocketkv", every=-1), "every=-1"),
    ],
)
def test_options_out_of_range_are_refused(spec, told):
    with pytest.raises(UsageError, match=told):
        make(spec.pop("name"), **spec)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_keys_is_kept(name):
    for keys in (64, 300, 5000):
        mechanism = make(name).within(keys, 40_000)
        assert mechanism.budget == keys and mechanism.least <= keys
        shape = Shape(9, 3, 64, 64, 2.0)
        cost = mechanism.cost(40_000, shape)
        # What RocketKV scores are keys without their values, which it counts as whole keys.
        assert cost.decode_keys <= keys * (1.5 if name == "rocketkv" else 1) + 1
        assert cost.kept_bytes >= mechanism.keeps(40_000) * shape.token_bytes
        half, kept = mechanism.cost(40_000, Shape(9, 3, 64, 64, 1.0)), mechanism.keeps(40_000)
        assert cost.kept_bytes == pytest.approx(half.kept_bytes + kept * shape.token_bytes / 2)


def test_rocketkv_keeps_what_the_paper_says():
    mechanism = make("rocketkv", budget=512)
    for n in (512, 4096, 131_072, 10_000_000):
        c = n / 512
        a = min(0.2 + 0.06 * math.log2(c), 0.8)
        assert mechanism.keeps(n) == pytest.approx(n / c**a, abs=1)
    assert mechanism.keeps(100) == 512
    assert mechanism.approximation(512, 64) == (1, 64)
    assert mechanism.approximation(2048, 64) == (2, 32)
    assert mechanism.approximation(512 * 9, 64) == (3, 21)
