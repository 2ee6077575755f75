"""Blocks read as rows, and bounds kept side by side: what plain tensors give, after forks, cuts, in any page order."""

import pytest
import torch

from longspan.kv.base import PAGE, SUMMARIES, TensorKV
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
ROTARY = Rotary(100.0 ** (-torch.arange(4, dtype=torch.float64) / 4))


def tokens(seed, count):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, count, 8, generator=gen) for _ in "kv")


def made(limit=None):
    budget = Budget(limit)
    return PagedKV(PagePool(2, 8, 8, torch.float32, torch.device("cpu"), budget, summaries=SUMMARIES, block=16), ROTARY)


def check(kv, k, v):
    plain = TensorKV(k, v, ROTARY)
    assert kv.length == plain.length
    full, last = kv.length // 16, -(-kv.length // 16) - 1
    blocks = torch.stack([torch.tensor([0, full // 2, last]), torch.tensor([1, full - 1, last])]).unsqueeze(0)
    cut = 2 * 16 + kv.length - last * 16  # behind the last token rows mean nothing
    for rotated in (True, False):
        torch.testing.assert_close(kv.bounds(16, rotated=rotated), plain.bounds(16, rotated=rotated))
        for mine, theirs in zip(
            kv.gather_blocks(blocks, 16, rotated=rotated), plain.gather_blocks(blocks, 16, rotated=rotated), strict=True
        ):
            torch.testing.assert_close(mine[:, :, :cut], theirs[:, :, :cut])


@pytest.mark.parametrize("limit", [None, 1 << 20])
def test_after_appends_cuts_and_forks(limit):
    kv, (k, v) = made(limit), tokens(0, 300)
    for start in range(0, 300, 75):
        kv.append(k[:, :, start : start + 75], v[:, :, start : start + 75])
        check(kv, k[:, :, : start + 75], v[:, :, : start + 75])
    fork = kv.fork()
    held = {"kv": (k, v), "fork": (k, v)}
    for name, length, seed in (("kv", 229, 1), ("fork", 300, 2), ("kv", 100, 3)):
        one, more = kv if name == "kv" else fork, tokens(seed, 90)
        one.truncate(length)
        one.append(*more)
        held[name] = tuple(torch.cat([old[:, :, :length], new], 2) for old, new in zip(held[name], more, strict=True))
        check(kv, *held["kv"])
        check(fork, *held["fork"])


def test_in_any_page_order():
    first = made()
    k, v = tokens(4, 6 * PAGE)
    second = PagedKV(first.pool, ROTARY)
    for page in range(6):  # pages of the two lie in turns
        part = slice(page * PAGE, (page + 1) * PAGE)
        first.append(k[:, :, part], v[:, :, part])
        second.append(v[:, :, part], k[:, :, part])
    check(first, k, v)
    check(second, v, k)
