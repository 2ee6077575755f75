"""Each mechanism against its paper's equations, and the identities that every sparse mechanism must satisfy."""

import plain
import pytest
import torch

from longspan import attend
from longspan.attention import make
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUPERLINEAR = dict(window=70, spans=3, backward=3.0, forward=1.0, power=0.5, span_power=0.5)
CASES = [
    ("dense", {}, {}),
    ("streaming", dict(window=50, sinks=4), {}),
    ("streaming", dict(window=1, sinks=0), {}),
    ("retrieval", dict(window=33, sinks=3, neighbours=1), dict(chosen_pages=(1, 3))),
    ("retrieval", dict(window=40, sinks=0, neighbours=0), dict(chosen_pages=(0,))),
    ("sparse", dict(window=40, sinks=3), {}),
    ("sparse", dict(window=1, sinks=0, density=2.5), {}),
    ("quest", dict(budget=128, window=20, sinks=3, who="head"), {}),
    ("quest", dict(budget=64, window=1, sinks=0, who="layer"), {}),
    ("quest", dict(budget=160, window=33, sinks=20, who="model"), dict(chosen_pages=(3, 0, 1))),
    ("sparq", dict(budget=72, window=20, sinks=3, who="head", channels=5, block=4), {}),
    ("sparq", dict(budget=64, window=1, sinks=0, who="layer", channels=3, block=1), {}),
    ("sparq", dict(budget=160, window=33, sinks=20, who="model", channels=4, block=4), dict(chosen_pages=(3, 0, 1))),
    ("superlinear", {**SUPERLINEAR, "gate": "joint", "summary": "key"}, {}),
    ("superlinear", {**SUPERLINEAR, "gate": "routed", "summary": "key"}, {}),
    ("superlinear", {**SUPERLINEAR, "gate": "joint", "summary": "bounds"}, {}),
    ("superlinear", {**SUPERLINEAR, "gate": "joint", "summary": "key", "sinks": 5}, {}),
    ("superlinear", {**SUPERLINEAR, "gate": "routed", "summary": "key", "sinks": 70, "backward": 1.0}, {}),
    ("superlinear", {**SUPERLINEAR, "gate": "routed", "summary": "bounds", "power": 0.55, "span_power": 0.55}, {}),
    (
        "superlinear",
        {**SUPERLINEAR, "gate": "joint", "summary": "key", "window": 9, "power": 0.55, "span_power": 0.4},
        {},
    ),
]
IDS = [f"{name}-{i}" for i, (name, _, _) in enumerate(CASES)]


def inputs(seed, queries, keys, group, dtype=torch.float64, batch=1, kv_heads=2, dim=16, value_dim=16):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=gen, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def expected(name, options, hints, q, k, v):
    if name == "dense":
        return plain.dense(q, k, v)
    if name == "streaming":
        return plain.streaming(q, k, v, **options)
    if name == "retrieval":
        return plain.retrieval(
            q, k, v, options["window"], options["sinks"], hints["chosen_pages"], options["neighbours"]
        )
    if name == "sparse":
        return plain.sparse(q, k, v, **options)
    if name in ("quest", "sparq"):
        return plain.quest(q, k, v, **options, **hints)
    return plain.superlinear(q, k, v, **options)


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 301), (63, 64), (63, 333), (257, 257)])
@pytest.mark.parametrize("group", [1, 3])
def test_follows_its_equations(name, options, hints, queries, keys, group):
    q, k, v = inputs(1, queries, keys, group, batch=2 if queries == 63 else 1, value_dim=16 if group == 1 else 24)
    out = attend(q, k, v, name, **hints, **options)
    torch.testing.assert_close(out, expected(name, options, hints, q, k, v), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_and_sixteen_heads_a_group(name, options, hints, dtype):
    q, k, v = inputs(2, 63, 300, 16, dtype, kv_heads=1)
    out = attend(q, k, v, name, **hints, **options)
    assert out.dtype == dtype
    # The same rounded inputs in float64: choices agree because scores are computed in float32 at least.
    truth = expected(name, options, hints, q, k, v)
    # A choice between two nearly equal spans may fall either way after rounding; all but a few rows must agree.
    close = torch.isclose(out.double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]).all(-1)
    assert close.float().mean() > 0.995


EVERYTHING = [
    ("streaming", dict(window=4000, sinks=0), {}),
    ("streaming", dict(window=100, sinks=4000), {}),
    ("retrieval", dict(window=10, neighbours=1), dict(chosen_pages=tuple(range(0, 40, 2)))),
    ("sparse", dict(window=4000), {}),
    ("sparse", dict(window=1, sinks=4000), {}),
    ("sparse", dict(window=1, sinks=0, density=100.0), {}),
    ("quest", dict(budget=900, window=1, sinks=0, who="head"), {}),
    ("quest", dict(budget=900, window=33, sinks=70, who="layer"), {}),
    ("quest", dict(budget=900, window=1, who="model"), dict(chosen_pages=tuple(range(15, -1, -1)))),
    ("sparq", dict(budget=900, window=1, sinks=0, channels=2, block=1), {}),
    ("sparq", dict(budget=900, window=33, sinks=70, who="layer", block=16), {}),
    ("infini", dict(segment=4000), {}),
    ("superlinear", dict(window=4000), {}),
    ("superlinear", dict(window=8, spans=1, backward=1e6, forward=1e6), {}),
    ("superlinear", dict(window=8, spans=64, gate="joint"), {}),
    ("superlinear", dict(window=8, spans=1, backward=1e6, forward=1e6, gate="routed"), {}),
    ("superlinear", dict(window=64, spans=64, summary="bounds"), {}),
]


@pytest.mark.parametrize("name,options,hints", EVERYTHING, ids=[f"{c[0]}-{i}" for i, c in enumerate(EVERYTHING)])
@pytest.mark.parametrize("queries,keys,group", [(1, 777, 3), (63, 190, 1), (129, 129, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_selecting_everything_equals_dense(name, options, hints, queries, keys, group, dtype):
    q, k, v = inputs(3, queries, keys, group, dtype)
    torch.testing.assert_close(
        attend(q, k, v, name, **hints, **options).double(),
        attend(q, k, v, "dense").double(),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_lies_in_the_future_never_changes_an_output(name, options, hints, dtype):
    queries = keys = 300
    q, k, v = inputs(4, queries, keys, 3, dtype)
    clean = attend(q, k, v, name, **hints, **options)
    for t in (0, 1, 62, 100, 255, 256, 298):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, t + 1 :] = float("nan")
        poisoned_v[:, :, t + 1 :] = float("nan")
        out = attend(q, poisoned_k, poisoned_v, name, **hints, **options)
        torch.testing.assert_close(out[:, :, : t + 1], clean[:, :, : t + 1], atol=TOLERANCE[dtype], rtol=0)
        assert out[:, :, t + 1 :].isnan().any()


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_not_selected_never_changes_an_output(name, options, hints, dtype):
    q, k, v = inputs(5, 1, 900, 1, dtype)
    # Which keys does the query read? Those whose value's gradient is not zero.
    v64 = v.double().requires_grad_()
    attend(q.double(), k.double(), v64, name, **hints, **options).sum().backward()
    read = (v64.grad != 0).any(-1)
    if name == "dense":
        assert read.all()
        return
    assert not read.all()
    poisoned = v.masked_fill(~read.unsqueeze(-1), float("nan"))
    clean = attend(q, k, v, name, **hints, **options)
    assert clean.isfinite().all()
    torch.testing.assert_close(attend(q, k, poisoned, name, **hints, **options), clean, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunks", [(1,), (7, 64, 1, 130), (299, 1)])
def test_prefill_in_chunks_and_decode_equal_prefill_at_once(name, options, hints, dtype, chunks):
    keys = 300
    q, k, v = inputs(6, keys, keys, 3, dtype)
    whole = attend(q, k, v, name, **hints, **options)
    done, parts, i = 0, [], 0
    while done < keys:
        step = min(chunks[i % len(chunks)], keys - done)
        stop = done + step
        parts.append(attend(q[:, :, done:stop], k[:, :, :stop], v[:, :, :stop], name, **hints, **options))
        done, i = stop, i + 1
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name,options,hints", CASES, ids=IDS)
def test_a_page_table_in_any_order_gives_the_same(name, options, hints):
    from longspan.attention.base import Hints

    q, k, v = inputs(7, 63, 900, 3)
    hint = Hints(chosen_pages=tuple(hints.get("chosen_pages", ())), layer=9)
    truth = attend(q, k, v, name, **hints, **options)
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"))
    pool.reserve(25)
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    pool._free = torch.randperm(25, generator=torch.Generator().manual_seed(8)).tolist()
    kv = PagedKV(pool)
    for start in range(0, 900, 170):
        kv.append(k[:, :, start : start + 170], v[:, :, start : start + 170])
    assert kv.table != sorted(kv.table)
    out = make(name, **options).attend(q, kv, hints=hint)
    torch.testing.assert_close(out, truth, atol=1e-12, rtol=1e-12)


def test_pages_dropped_by_streaming_are_never_read():
    q, k, v = inputs(9, 1, 1000, 3)
    mechanism = make("streaming", window=100, sinks=70)
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"))
    kv = PagedKV(pool)
    kv.append(k[:, :, :-1], v[:, :, :-1])
    truth = attend(q, k, v, mechanism)
    kv.drop(*mechanism.dropped(999))
    pool.keys[:, pool._free] = float("nan")
    pool.values[:, pool._free] = float("nan")
    kv.append(k[:, :, -1:], v[:, :, -1:])
    assert kv.pages_held <= (100 + 70) // PAGE + 3
    torch.testing.assert_close(mechanism.attend(q, kv), truth)
