"""The proof's short form, by the code of `benchmarks/server_load.py`: many clients, odd bodies, nothing left behind."""

import asyncio
import random
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import server_clients as clients
from benchmarks.server_load import PATHS


@pytest.fixture
def named(live, monkeypatch):
    """The benchmarks' clients ask for a model of this name."""
    monkeypatch.setattr(clients, "MODEL", live.model)
    return live


def held(scheduler):
    """File handles (the clients' own among them), threads and pages."""
    return psutil.Process().num_fds(), threading.active_count(), sum(scheduler.metrics().pages_now.values())


def test_many_clients_leave_nothing_behind(named):
    asyncio.run(clients.many(named.url, 6, 2, 0.2, 200))  # threads of pools have come, contexts are kept for reuse
    assert named.idle()
    time.sleep(0.2)
    before = held(named.scheduler)
    seen = asyncio.run(clients.many(named.url, 6, 2, 0.6, 200))
    assert named.idle()
    assert set(seen.statuses) <= {"200", "201", "429"} and seen.statuses["200"] > 6, seen.statuses
    assert seen.ingested > 200 and seen.tokens >= 48 * 6
    until = time.perf_counter() + 5
    while (after := held(named.scheduler))[0] > before[0] + 1 and time.perf_counter() < until:
        time.sleep(0.05)  # closed connections are noticed a little later
    assert after[0] <= before[0] + 1 and after[1] <= before[1] + 2, (before, after)
    assert named.scheduler.metrics().sessions_now == 0
    assert after[2] <= 16 * 16 * 3, "sixteen contexts of at most a thousand tokens in three layers"


@pytest.mark.parametrize("path", PATHS)
def test_odd_bodies_never_fail_here(named, path):
    drawn, statuses = random.Random(path), set()
    for _ in range(12):
        body = clients.odd_body(path, drawn)
        answer = named.http.post(path, content=body, headers={"Content-Type": "application/json"})
        statuses.add(answer.status_code)
        assert answer.status_code < 500, (body, answer.text)
    assert 400 in statuses
