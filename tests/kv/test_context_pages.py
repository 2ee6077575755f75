"""Whole contexts over pages: formats, budgets and forks, through a model's layers."""

import pytest
import torch

from longspan.attention import parse
from longspan.engine import contexts
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, UnknownNameError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget

TOKENS = [(7 * i * i + 3 * i) % 90 + 5 for i in range(400)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(contexts, "CHUNK", 2 * PAGE)


def new(tiny, spec="dense", **options):
    return KVContext(tiny, parse(spec), **options)


def test_fp8_pages_are_read_as_what_they_hold_and_taken_back_to_the_bit(tiny):
    exact, small = new(tiny), new(tiny, kv_format="fp8")
    for context in (exact, small):
        context.extend(TOKENS[:300])
    truth, first = exact.step(TOKENS[300:310]), small.step(TOKENS[300:310])
    assert small.nbytes < exact.nbytes / 2
    assert not torch.equal(first, truth)
    same = new(tiny)
    small.truncate(300)
    for held, kv in zip(same.layers, small.layers, strict=True):
        held.append(kv.keys(0, 300), kv.values(0, 300))
    same.tokens = TOKENS[:300]
    torch.testing.assert_close(same.step(TOKENS[300:310]), first, atol=1e-4, rtol=1e-4)
    for question in (30, 90, 200):  # all of them close the page that was open
        small.truncate(300)
        small.step(TOKENS[:question])
        small.truncate(300)
        assert torch.equal(small.step(TOKENS[300:310]), first)


def test_a_fork_reads_on_by_itself_and_shares_what_was_read(tiny):
    root = Budget(None, "KV")
    context = new(tiny, budget=root)
    context.extend(TOKENS[:200])
    used = root.used
    fork = context.fork()
    assert root.used == used and fork.tokens == context.tokens
    context.extend(TOKENS[200:260])
    fork.extend(TOKENS[300:370])
    alone = new(tiny)
    alone.extend(TOKENS[:200])
    alone.extend(TOKENS[300:370])
    torch.testing.assert_close(fork.step(TOKENS[:5]), alone.step(TOKENS[:5]), atol=1e-5, rtol=1e-5)
    alone.truncate(200)
    alone.extend(TOKENS[200:260])
    torch.testing.assert_close(context.step(TOKENS[:5]), alone.step(TOKENS[:5]), atol=1e-5, rtol=1e-5)
    context.free()
    fork.truncate(200)
    assert root.used == used
    fork.free()
    assert root.used == 0 and fork.length == 0


def test_a_session_that_is_full_is_refused_and_others_read_on(tiny):
    page = sum(kv.pool.least_bytes for kv in new(tiny).layers)
    whole = Budget(6 * page, "KV")
    full, other = (new(tiny, budget=Budget(4 * page, name, whole)) for name in ("full", "other"))
    full.extend(TOKENS[: 2 * PAGE])
    with pytest.raises(PoolExhaustedError, match="full budget"):
        full.extend(TOKENS[: 3 * PAGE])
    assert full.length == 4 * PAGE, "the chunk that fitted was read"
    other.extend(TOKENS[: 2 * PAGE])
    with pytest.raises(PoolExhaustedError, match="KV budget"):
        other.step(TOKENS[:1])
    assert other.length == 2 * PAGE == other.layers[0].length == other.layers[-1].length
    with pytest.raises(PoolExhaustedError):
        other.fork(Budget(page, "small", whole))
    full.free()
    alone = new(tiny)
    alone.extend(TOKENS[: 2 * PAGE])
    torch.testing.assert_close(other.step(TOKENS[:1]), alone.step(TOKENS[:1]), atol=1e-5, rtol=1e-5)


def test_bad_formats_and_budgets_are_refused(tiny):
    with pytest.raises(UnknownNameError, match=r"int5.*fp8"):
        new(tiny, kv_format="int5")
    with pytest.raises(UsageError, match="does not suit"):
        new(tiny, kv_format="fp64")
    page = sum(kv.pool.least_bytes for kv in new(tiny).layers)
    with pytest.raises(UsageError, match=r"below one page for each of \d+ layers.*--kv-budget"):
        new(tiny, budget=Budget(page - 1))
    new(tiny, budget=Budget(page)).extend(TOKENS[:PAGE])


def test_pages_keep_the_summaries_that_the_mechanism_reads(tiny):
    context = new(tiny, "superlinear:window=70,summary=bounds")
    context.extend(TOKENS)
    kv = context.layers[0]
    assert kv.pool.summaries == ("lowest", "highest") and not kv.blocks.asked
    full = len(TOKENS) // PAGE
    pages = kv.keys(0, full * PAGE).unflatten(2, (full, PAGE))
    assert torch.equal(kv.summary("lowest"), pages.amin(3)) and torch.equal(kv.summary("highest"), pages.amax(3))
