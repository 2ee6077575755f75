"""Tiers below the device: specifications, files that leave nothing behind, full disks, pages brought up early."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from longspan.errors import PoolExhaustedError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.prefetch import Prefetcher
from longspan.kv.tiers import DISK, HOST, TierLimits, Tiers
from longspan.kv.traffic import Traffic

RECORD = 2 * 2 * PAGE * 4 * 4


def pool(limits):
    return PagePool(2, 4, 4, torch.float32, torch.device("cpu"), tiers=Tiers(limits))


def filled(limits, tokens=640):
    kv = PagedKV(pool(limits))
    kv.reads_below = True
    k, v = torch.randn(2, 1, 2, tokens, 4, generator=torch.Generator().manual_seed(1))
    kv.append(k, v)
    kv.commit()
    return kv, k, v


def test_specifications():
    assert TierLimits.parse("host=8GiB") == TierLimits(8 << 30)
    made = TierLimits.parse("host=1MB,disk=2GiB:/tmp/a,b=c")
    assert (made.host, made.disk, str(made.folder)) == (10**6, 2 << 30, "/tmp/a,b=c")
    (made.folder).rmdir()
    for wrong, why in {
        "": "names no tier", "disk=5GB": "names no folder", "ram=5GB": "not understood", "host": "no size",
        "host=lots": "no size", "host=1GB,host=2GB": "not understood", "disk=1GB:/proc/nowhere": "can't write",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=why):
            TierLimits.parse(wrong)


def test_what_was_used_longest_ago_goes_to_the_disk_and_comes_back_exactly(tmp_path):
    kv, k, v = filled(TierLimits(3 * RECORD, 20 * RECORD, tmp_path))
    tiers = kv.pool.tiers
    kv.demote(range(3), "summary", keep_exact=True)
    assert (tiers.used(HOST), tiers.used(DISK)) == (3 * RECORD, 0)
    kv.demote([3, 4], "summary", keep_exact=True)
    places = {page: kv.pool.find_below(handle)[0].tier for page, handle in kv.exact.items()}
    assert places == {0: DISK, 1: DISK, 2: DISK, 3: HOST, 4: HOST}
    assert torch.equal(kv.keys(0, 640), k) and torch.equal(kv.values(0, 640), v)
    assert (tiers.traffic.host_down, tiers.traffic.disk_down) == (5 * RECORD, 3 * RECORD)
    assert tiers.traffic.misses == 3 and tiers.traffic.disk_up == 3 * RECORD
    kv.promote([0, 4])
    assert torch.equal(kv.keys(0, 640), k) and tiers.used(DISK) == 2 * RECORD
    kv.free()
    assert tiers.used(HOST) == tiers.used(DISK) == 0


def test_pages_that_were_asked_for_are_here_before_they_are_read(tmp_path):
    kv, k, _ = filled(TierLimits(RECORD, 20 * RECORD, tmp_path))
    kv.demote(range(6), "summary", keep_exact=True)
    kv.prefetch([1, 2, 3])
    deadline = time.monotonic() + 30
    while kv.pool.tiers.traffic.disk_up < 3 * RECORD and time.monotonic() < deadline:
        time.sleep(0.01)
    moved = kv.pool.tiers.traffic.disk_up
    assert torch.equal(kv.keys(PAGE, 4 * PAGE), k[:, :, PAGE : 4 * PAGE])
    traffic = kv.pool.tiers.traffic
    assert traffic.hits + traffic.waits == 3 and traffic.misses == 0 and traffic.disk_up == moved
    # Slots that hold other pages by now are not taken for what they were.
    kv.truncate(0)
    other, _ = torch.randn(2, 1, 2, 640, 4, generator=torch.Generator().manual_seed(2))
    kv.append(other, other)
    kv.commit()
    kv.demote(range(6), "summary", keep_exact=True)
    assert torch.equal(kv.keys(0, 640), other)
    kv.pool.tiers.prefetcher.close()


class Slow:
    page_bytes = 10
    on_gpu = False

    def __init__(self):
        self.go, self.loads = threading.Event(), []

    def load(self, slots):
        self.go.wait()
        self.loads.append(list(slots))
        if 200 in slots:
            raise OSError("unreadable")
        return torch.tensor(slots, dtype=torch.uint8).view(-1, 1).expand(-1, 10)


def test_the_queue_and_what_is_held_are_bounded():
    source, traffic = Slow(), Traffic()
    fetcher = Prefetcher(traffic, waiting=2, staged=400)
    for first in range(0, 100, 10):
        fetcher.want(source, range(first, first + 10))
    assert fetcher._bytes <= 400
    source.go.set()
    found = fetcher.take(source, [0, 1, 99])
    assert set(found) == {0, 1} and all(int(record[0]) == slot for slot, record in found.items())
    assert traffic.misses == 1 and traffic.hits + traffic.waits == 2
    fetcher.forget(source, [0])
    assert fetcher.take(source, [0]) == {}
    fetcher.want(source, [200])
    assert fetcher.take(source, [200]) == {}, "who reads the page meets the fault itself"
    fetcher.close()
    fetcher.close()


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, at):
    kv, k, v = filled(TierLimits(2 * RECORD, 100 * RECORD, tmp_path))
    calls, allocate = [], os.posix_fallocate

    def full(handle, start, count):
        calls.append(count)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(handle, start, count)

    monkeypatch.setattr(os, "posix_fallocate", full)
    kv.demote([0, 1], "summary", keep_exact=True)
    with pytest.raises(PoolExhaustedError, match="No space left on device; make room there") as error:
        for page in range(2, 10):
            kv.demote([page], "fp8", keep_exact=True)
        kv.demote(range(10), "summary", keep_exact=True)
        kv.promote(range(10))
        kv.append(*torch.randn(2, 1, 2, 6400, 4))
        kv.commit()
        kv.demote(range(100), "summary", keep_exact=True)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert torch.equal(kv.keys(0, 128), k[:, :, :128]) and torch.equal(kv.values(0, 128), v[:, :, :128])
    tiers = kv.pool.tiers
    used = {HOST: 0, DISK: 0}
    for below in kv.pool.below:
        used[below.tier] += below.page_bytes * sum(count > 0 for count in below.references)
    assert used == {tier: tiers.used(tier) for tier in used}
    assert sum(map(sum, (below.references for below in kv.pool.below))) == len(kv.exact)


def test_more_than_the_tiers_hold_is_refused_before_anything_moves(tmp_path):
    kv, k, _ = filled(TierLimits(2 * RECORD, 3 * RECORD, tmp_path))
    with pytest.raises(PoolExhaustedError, match="raise --kv-tier"):
        kv.demote(range(6), "summary", keep_exact=True)
    assert not kv.exact and torch.equal(kv.keys(0, 640), k)
    kv.demote(range(5), "summary", keep_exact=True)
    assert torch.equal(kv.keys(0, 640), k)


def test_a_killed_process_leaves_no_file(tmp_path):
    code = f"""
import sys, time, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_tiers import *
kv, *_ = filled(TierLimits(RECORD, 50 * RECORD, pathlib.Path({str(tmp_path)!r})))
kv.demote(range(8), "summary", keep_exact=True)
print(kv.pool.tiers.used(DISK), flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert int(child.stdout.readline()) == 7 * RECORD
    child.kill()
    child.wait()
    assert not list(tmp_path.iterdir())


def back(kv, wanted):
    """Codes come back bit by bit; a GPU's products that turn keys back round by how many there are at once."""
    exact = kv.pool.format.name == "fp32"
    for found, was in zip((kv.keys(0, 6400), kv.values(0, 6400)), wanted, strict=True):
        torch.testing.assert_close(found, was, atol=0 if exact else 1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("made", ["fp32", "int4:residual=0,sinks=0"])
def test_a_gpus_pages_come_back_through_pinned_memory(tmp_path, made):
    tiers = Tiers(TierLimits(40 * RECORD, 400 * RECORD, tmp_path))
    kv = PagedKV(PagePool(2, 16, 16, torch.float32, torch.device("cuda"), kv_format=made, tiers=tiers))
    kv.reads_below = True
    k, v = torch.randn(2, 1, 2, 6400, 16, generator=torch.Generator().manual_seed(1)).cuda()
    kv.append(k, v)
    kv.commit()
    wanted = kv.keys(0, 6400).clone(), kv.values(0, 6400).clone()
    kv.demote(range(90), "summary", keep_exact=True)
    assert tiers.used(HOST) and tiers.used(DISK)
    for _ in range(5):
        kv.prefetch(range(90))
        back(kv, wanted)
    kv.promote(range(90))
    back(kv, wanted)
    tiers.prefetcher.close()
