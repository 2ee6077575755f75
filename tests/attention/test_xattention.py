"""XAttention against its equations as loops, and the identities of a prefill by blocks."""

import math
from itertools import pairwise

import plain
import pytest
import torch

from longspan import attend
from longspan.attention import Hints, make, xattention
from longspan.errors import LongspanError
from longspan.kv.base import TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

BLOCK = 128
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
OPTIONS = [dict(threshold=0.5), dict(threshold=0.6, stride=8), dict(threshold=0.3, stride=32)]
IDS = ["stride-16", "stride-8", "stride-32"]


def inputs(seed, queries, keys, group=1, dtype=torch.float64, batch=1, kv_heads=2, dim=16, value_dim=16):
    gen = torch.Generator().manual_seed(seed)
    # Peaked queries: with flat ones every block would hold the same share.
    q = 2 * torch.randn(batch, kv_heads * group, queries, dim, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=gen, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def shares(q, k, stride):
    """The share of each block of `k` [N, D], all before the block of queries `q` [128, D]."""
    dots = (q @ k.T).tolist()
    total = [0.0] * (k.shape[0] // BLOCK)
    for i in range(0, BLOCK, stride):
        weights = {}
        for j in range(0, k.shape[0], stride):
            antidiagonal = [dots[i + stride - 1 - s][j + s] for s in range(stride)]
            weights[j] = math.exp(sum(antidiagonal) / stride / math.sqrt(16))
        for j, weight in weights.items():
            total[j // BLOCK] += weight / sum(weights.values()) / (BLOCK // stride)
    return total


def chosen(q, k, threshold, stride=16):
    """The fewest blocks, the first of the context among them, that hold `threshold` together."""
    if k.shape[0] == 0:
        return set()
    share = shares(q, k, stride)
    found = {0}
    for block in sorted(range(1, len(share)), key=lambda p: -share[p]):
        if sum(share[p] for p in found) >= threshold:
            break
        found.add(block)
    return found


def expected(q, k, v, **options):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    first = k.shape[2] - q.shape[2]
    known = {}

    def keys(b, h, t):
        start = t // BLOCK * BLOCK
        if start < first or start + BLOCK > k.shape[2]:
            return list(range(t + 1))  # the block is not there as a whole
        if (b, h, start) not in known:
            block = q[b, h, start - first : start - first + BLOCK]
            known[b, h, start] = chosen(block, k[b, h // group, :start], **options)
        far = [p * BLOCK + i for p in sorted(known[b, h, start]) for i in range(BLOCK)]
        return far + list(range(start, t + 1))

    return plain.per_query(q, k, v, keys)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize(
    "queries,keys,group,batch",
    [(1, 1, 1, 1), (1, 301, 3, 1), (128, 128, 3, 1), (300, 300, 1, 2), (257, 513, 3, 1), (700, 700, 1, 1)],
)
def test_follows_its_equations(options, queries, keys, group, batch):
    q, k, v = inputs(1, queries, keys, group, batch=batch, value_dim=16 if group == 1 else 24)
    out = attend(q, k, v, "xattention", **options)
    torch.testing.assert_close(out, expected(q, k, v, **options), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options,group", [*((options, 1) for options in OPTIONS), (OPTIONS[0], 16)])
def test_every_float_type_and_sixteen_heads_a_group(options, dtype, group):
    q, k, v = inputs(2, 140, 1036, group, dtype, kv_heads=1)
    out = attend(q, k, v, "xattention", **options)
    assert out.dtype == dtype
    truth = expected(q, k, v, **options)
    torch.testing.assert_close(out.double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not torch.allclose(attend(q, k, v, "dense").double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("queries,keys,group", [(1, 777, 3), (700, 1000, 1), (513, 513, 16)])
def test_a_threshold_of_one_equals_dense(dtype, queries, keys, group):
    # Far keys that weigh nothing in float32 are read too: their shares round to 0.
    q, k, v = inputs(3, queries, keys, group, dtype, kv_heads=1)
    q = q * 20
    torch.testing.assert_close(
        attend(q, k, v, "xattention", threshold=1.0).double(),
        attend(q, k, v, "dense").double(),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_lies_in_the_future_never_changes_an_output(options, dtype):
    q, k, v = inputs(4, 600, 600, 3, dtype)
    clean = attend(q, k, v, "xattention", **options)
    for t in (0, 1, 127, 128, 300, 383, 511, 598):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, t + 1 :] = float("nan")
        poisoned_v[:, :, t + 1 :] = float("nan")
        out = attend(q, poisoned_k, poisoned_v, "xattention", **options)
        torch.testing.assert_close(out[:, :, : t + 1], clean[:, :, : t + 1], atol=TOLERANCE[dtype], rtol=0)
        assert out[:, :, t + 1 :].isnan().any()


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_that_were_not_chosen_never_reach_an_output(options, dtype):
    q, k, v = inputs(5, BLOCK, 10 * BLOCK, 2, dtype)
    clean = attend(q, k, v, "xattention", **options)
    poisoned, left = v.clone(), 0
    for kv_head in range(2):
        read = {9}
        for head in (2 * kv_head, 2 * kv_head + 1):
            read |= chosen(q[0, head].double(), k[0, kv_head, : 9 * BLOCK].double(), **options)
        for block in set(range(10)) - read:
            poisoned[:, kv_head, block * BLOCK : (block + 1) * BLOCK] = float("nan")
            left += 1
    assert left > 0
    out = attend(q, k, poisoned, "xattention", **options)
    torch.testing.assert_close(out, clean, atol=0, rtol=0)


def test_a_broken_key_shows():
    q, k, v = inputs(6, 512, 512)
    k[:, :, 140] = float("nan")
    out = attend(q, k, v, "xattention", threshold=0.5)
    assert out[:, :, :140].isfinite().all()
    assert out[:, :, 140:].isnan().all()


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunks", [(128,), (256, 128), (640,)])
def test_chunks_of_whole_blocks_equal_prefill_at_once(options, dtype, chunks):
    keys = 900
    q, k, v = inputs(7, keys, keys, 3, dtype)
    whole = attend(q, k, v, "xattention", **options)
    done, parts, i = 0, [], 0
    while done < keys:
        stop = min(done + chunks[i % len(chunks)], keys)
        parts.append(attend(q[:, :, done:stop], k[:, :, :stop], v[:, :, :stop], "xattention", **options))
        done, i = stop, i + 1
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("queries,keys", [(1, 900), (1, 896), (60, 1000), (100, 896), (250, 890)])
def test_less_than_a_block_attends_densely(queries, keys):
    q, k, v = inputs(8, queries, keys, 3)
    dense = attend(q, k, v, "dense")
    out = attend(q, k, v, "xattention", threshold=0.1)
    inside = [
        t for t in range(keys - queries, keys) if t // BLOCK * BLOCK >= keys - queries and t < keys // BLOCK * BLOCK
    ]
    outside = [i for i in range(queries) if keys - queries + i not in inside]
    assert len(inside) == (BLOCK if queries == 250 else 0)
    torch.testing.assert_close(out[:, :, outside], dense[:, :, outside], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_a_page_table_in_any_order_and_rotation_when_read_give_the_same(options):
    q, k, v = inputs(9, 300, 900, 3)
    rotary = Rotary(1.0 / 100 ** (torch.arange(8) / 8))
    truth = make("xattention", **options).attend(rotary.range(q, 600), TensorKV(rotary.range(k, 0), v))
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"))
    pool.reserve(25)
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    pool._free = torch.randperm(25, generator=torch.Generator().manual_seed(8)).tolist()
    kv = PagedKV(pool, rotary)
    for start in range(0, 900, 170):
        kv.append(k[:, :, start : start + 170], v[:, :, start : start + 170])
    assert kv.table != sorted(kv.table)
    out = make("xattention", **options).attend(q, kv)
    torch.testing.assert_close(out, truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_work_in_pieces_gives_the_same(options, monkeypatch):
    q, k, v = inputs(10, 520, 1030, 3, batch=2)
    whole = attend(q, k, v, "xattention", **options)
    monkeypatch.setattr(xattention, "_PIECE", 1)
    torch.testing.assert_close(attend(q, k, v, "xattention", **options), whole, atol=1e-12, rtol=1e-12)


def test_fewer_blocks_are_read_as_the_threshold_falls():
    q, k, _ = inputs(11, 512, 2048 - BLOCK)
    kept = [make("xattention", threshold=threshold).choose(q, k, 1536, 0.25) for threshold in (1.0, 0.9, 0.7, 0.5, 0.2)]
    assert kept[0].sum() == 4 * (12 + 13 + 14 + 15) // 2
    for more, fewer in pairwise(kept):
        assert (more | ~fewer).all()  # what a lower threshold reads, a higher one reads too
        assert fewer.sum() < more.sum()
    assert kept[-1][..., 0].all()


def test_first_layers_can_be_dense():
    q, k, v = inputs(12, 640, 640)
    mechanism = make("xattention", threshold=0.3, dense_layers=2)
    dense = attend(q, k, v, "dense")
    first, last = (mechanism.attend(q, TensorKV(k, v), hints=Hints(layer=layer)) for layer in (1, 2))
    torch.testing.assert_close(first, dense, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(last, dense, atol=1e-3)


def test_prefill_costs_less_than_dense_and_decode_the_same():
    from longspan.attention.base import Shape

    shape = Shape(9, 3, 64, 64)
    dense = make("dense").cost(8192, shape)
    costs = [make("xattention", threshold=t).cost(8192, shape) for t in (0.3, 0.6, 0.85, 0.9, 0.99)]
    flops = [cost.prefill_flops for cost in costs]
    assert flops == sorted(flops) and flops[-1] < dense.prefill_flops
    assert all(cost.decode_flops == dense.decode_flops for cost in costs)
    # Dense reads each pair with 2 (D + Dv) FLOPs; the scores take 2 D / stride of them.
    everything = make("xattention", threshold=1.0, stride=32).cost(8192, shape)
    assert everything.prefill_flops == pytest.approx(dense.prefill_flops * (1 + 1 / 64))


@pytest.mark.parametrize("options", [dict(threshold=0.0), dict(threshold=1.1), dict(stride=0), dict(stride=24)])
def test_options_out_of_range_are_refused_in_one_line(options):
    with pytest.raises(LongspanError) as refused:
        make("xattention", **options)
    assert next(iter(options)) in str(refused.value) and "\n" not in str(refused.value)
