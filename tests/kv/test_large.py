"""Offsets beyond 2^31 elements: memory that is set aside and never touched costs nothing."""

from functools import partial

import pytest
import torch

from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

DIM = 128
SLOTS = 2**31 // (PAGE * DIM) + 64
"""With two heads, all of the second head's slots and the last of the first's lie beyond 2^31."""


def rows(count, dim, seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, count, dim, generator=gen).to(torch.bfloat16)


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_pages_beyond_two_to_the_31_elements(kv_format):
    pool = PagePool(
        2, DIM, 2, torch.bfloat16, torch.device("cpu"), kv_format=kv_format, summaries=("highest",), block=16
    )
    full = pool.native if kv_format is None else pool.plane(kv_format)
    for plane in {pool.native, full}:
        # Reserved without the memory being touched.
        plane.reserve(SLOTS)
        plane.free_slots = [3, SLOTS - 2, 1, SLOTS - 1]
    held = full.tensors["k"]
    assert held.numel() > 2**32 and (SLOTS - 2) * PAGE * DIM > 2**31
    kv = PagedKV(pool, Rotary(1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)))
    count = 3 * PAGE + 20
    k, v = rows(count, DIM, 1), rows(count, 2, 2)
    for start in range(0, count, 100):
        kv.append(k[:, :, start : start + 100], v[:, :, start : start + 100])
    used = [slot for slot, references in enumerate(full.references) if references]
    assert SLOTS - 1 in used and SLOTS - 2 in used
    close = {} if kv_format is None else {"rtol": 1 / 16 + 1e-2, "atol": 2e-2}
    same = torch.equal if kv_format is None else partial(torch.allclose, **close)
    assert same(kv.keys(0, count), k) and same(kv.values(0, count), v)
    index = torch.tensor([[0, 63, 64, 130, count - 1], [200, 199, 65, 1, 0]])
    got_k, got_v = kv.gather(index.unsqueeze(0), rotated=False)
    for head in range(2):
        assert same(got_k[:, head], k[:, head, index[head]]) and same(got_v[:, head], v[:, head, index[head]])
    assert torch.equal(kv.gather(index.unsqueeze(0), rotated=True)[0], kv.rotary(got_k, index.unsqueeze(0)))
    assert same(kv.gather_keys(index), k[:, :, index])
    assert torch.equal(kv.summary("highest", 16), k[:, :, : count // 16 * 16].unflatten(2, (-1, 16)).amax(3))
    saved = kv.tensors("")
    kv.truncate(PAGE + 7)
    assert same(kv.keys(0, PAGE + 7), k[:, :, : PAGE + 7])
    other = PagedKV(PagePool(2, DIM, 2, torch.bfloat16, torch.device("cpu"), kv_format=kv_format))
    other.restore("", count, saved)
    assert same(other.keys(0, count), k)
