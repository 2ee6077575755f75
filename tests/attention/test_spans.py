"""Spans of rows, gathered for each row, are read as the equation says, whatever lies outside them."""

import pytest
import torch

from longspan.attention import spans
from longspan.kv.base import TensorKV
from longspan.kv.rotary import Rotary

BATCH, HEADS, KEYS, DIM = 2, 3, 97, 16


def wanted(rows, k, v, lo, hi, scale):
    at = torch.arange(k.shape[2])
    inside = (at >= lo.unsqueeze(-1)) & (at <= hi.unsqueeze(-1))
    scores = (rows.double() @ k.double().mT * scale).masked_fill(~inside, float("-inf"))
    empty = ~inside.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights @ v.double(), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_gathered_spans(rotated, seed):
    torch.manual_seed(seed)
    rows, k, v = (torch.randn(BATCH, HEADS, n, DIM) for n in (11, KEYS, KEYS))
    rotary = Rotary(100.0 ** -(torch.arange(0, DIM, 2) / DIM), 1000) if rotated else None
    kv = TensorKV(k, v, rotary)
    lo = torch.randint(0, KEYS, (BATCH, HEADS, 11))
    hi = (lo + torch.randint(-2, 30, lo.shape)).clamp(max=KEYS - 1)
    lo[0, 0, 0], hi[0, 0, 0] = 0, KEYS - 1
    out, lse = spans.gathered(rows, kv, lo, hi, int((hi - lo).max()) + 1, 0.3)
    keys = kv.keys_at_own_positions(0, KEYS)
    right, right_lse = wanted(rows, keys, v, lo, hi, 0.3)
    assert (out - right).abs().max() < 2e-6
    empty = lo > hi
    assert empty.any() and bool((lse[empty] == float("-inf")).all()) and bool((out[empty] == 0).all())
    assert (lse - right_lse)[~empty].abs().max() < 2e-6


def test_nothing_is_read_where_all_are_empty():
    rows, k = torch.randn(1, 2, 3, DIM), torch.randn(1, 2, 0, DIM)
    lo = torch.zeros(1, 2, 3, dtype=torch.int64)
    out, lse = spans.gathered(rows, TensorKV(k, k), lo, lo - 1, 0, 1.0)
    assert not out.any() and bool((lse == float("-inf")).all())


def test_what_lies_outside_reaches_nothing():
    torch.manual_seed(0)
    rows, k, v = (torch.randn(1, 2, n, DIM) for n in (4, KEYS, KEYS))
    lo = torch.tensor([3, 10, 20, 30]).expand(1, 2, 4)
    hi = lo + torch.tensor([5, 0, 9, 20])
    clean = spans.gathered(rows, TensorKV(k, v), lo, hi, 21, 1.0)
    for x in (k, v):
        x[:, :, :3], x[:, :, 51:] = float("nan"), float("inf")
    found = spans.gathered(rows, TensorKV(k, v), lo, hi, 21, 1.0)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(clean, found, strict=True))
