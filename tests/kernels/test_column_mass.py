"""Column sums of the softmax against sums of the weights themselves."""

import pytest
import torch

from longspan.kernels import column_mass as kernel
from longspan.kernels.column_mass import column_mass, column_most, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def inputs(seed, batch, kv_heads, group, queries, keys, dtype=torch.float64, dim=8):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def plainly(q, k, scale):
    """The mass of each key and each query's log-sum-exp, a query at a time."""
    batch, heads, count, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    mass = torch.zeros(batch, kv_heads, keys, dtype=torch.float64)
    lse = torch.empty(batch, heads, count, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(count):
                seen = keys - count + t + 1
                scores = k[b, h // (heads // kv_heads), :seen].double() @ q[b, h, t].double() * scale
                lse[b, h, t] = torch.logsumexp(scores, 0)
                mass[b, h // (heads // kv_heads), :seen] += torch.softmax(scores, 0)
    return mass, lse


@pytest.mark.parametrize("batch,kv_heads,group,queries,keys", [(1, 1, 1, 1, 1), (2, 2, 3, 7, 19), (1, 1, 16, 33, 33)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("held", [1, 400, 1 << 23])
def test_it_is_the_sum_of_the_weights(monkeypatch, batch, kv_heads, group, queries, keys, dtype, held):
    monkeypatch.setattr(reference, "_HELD", held)
    q, k = inputs(0, batch, kv_heads, group, queries, keys, dtype)
    wanted, lse = plainly(q, k, 0.3)
    mass = column_mass(q, k, lse, scale=0.3)
    assert mass.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mass.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert float(mass.sum()) == pytest.approx(batch * kv_heads * group * queries, rel=1e-5)


def test_keys_that_are_not_seen_add_nothing_whatever_they_hold():
    q, k = inputs(1, 1, 2, 3, 20, 50)
    wanted, lse = plainly(q, k, 1.0)
    poisoned = k.clone()
    poisoned[:, :, 40:] = float("nan")
    # The queries before the first key that is NaN.
    first = column_mass(q[:, :, :10], poisoned[:, :, :40], lse[:, :, :10], scale=1.0)
    assert first.isfinite().all()
    whole = column_mass(q, poisoned, lse, scale=1.0)
    assert whole[:, :, :40].isfinite().all() and whole[:, :, 40:].isnan().all()
    torch.testing.assert_close(whole[:, :, :40], wanted[:, :, :40])


def test_the_face_is_the_reference():
    assert kernel.column_mass is reference.column_mass


@pytest.mark.parametrize("held", [1, 1 << 23])
def test_the_most_that_one_query_gives(monkeypatch, held):
    monkeypatch.setattr(reference, "_HELD", held)
    q, k = inputs(2, 2, 2, 3, 9, 21)
    _, lse = plainly(q, k, 0.5)
    each = [column_mass(q[:, h::3, t : t + 1], k[:, :, : 13 + t], lse[:, h::3, t : t + 1], scale=0.5)
            for h in range(3) for t in range(9)]  # fmt: skip
    wanted = torch.zeros(2, 2, 21, dtype=torch.float64)
    for mass in each:
        wanted[:, :, : mass.shape[2]] = torch.maximum(wanted[:, :, : mass.shape[2]], mass)
    torch.testing.assert_close(column_most(q, k, lse, scale=0.5), wanted, atol=1e-12, rtol=1e-12)
