"""Budgets: obeyed to the page, refused by name, and a refusal that harms nobody."""

import gc

import pytest
import torch

from longspan.errors import LongspanError, PoolExhaustedError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget, size
from longspan.kv.pages import PagedKV, PagePool

CPU = torch.device("cpu")
PAGE_BYTES = 2 * PAGE * (4 + 3) * 4


def rows(count, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, count, 4, generator=gen), torch.randn(1, 2, count, 3, generator=gen)


def pool_of(budget, **options):
    return PagePool(2, 4, 3, torch.float32, CPU, budget, **options)


def test_a_budget_is_full_at_its_last_page_and_not_before():
    budget = Budget(5 * PAGE_BYTES, "KV")
    kv = PagedKV(pool_of(budget))
    for _ in range(5):
        kv.append(*rows(PAGE))
    assert budget.left == 0
    with pytest.raises(PoolExhaustedError):
        kv.append(*rows(1))
    kv.truncate(5 * PAGE - 1)
    kv.append(*rows(1))
    assert kv.length == 5 * PAGE and budget.used == 5 * PAGE_BYTES
    assert kv.pool.nbytes == 5 * PAGE_BYTES, "no memory is set aside that the budget does not allow"


def test_quantised_pages_are_counted_at_their_size():
    fp8 = pool_of(None, kv_format="fp8").plane("fp8").page_bytes
    assert fp8 == 2 * PAGE * 7 + 2 * 2 * 4, "a byte a number, and a scale a head for keys and for values"
    budget = Budget(3 * PAGE_BYTES)
    kv = PagedKV(pool_of(budget, kv_format="fp8"))
    kv.append(*rows(3 * PAGE))
    assert budget.left == 0, "what is read together is read exactly"
    kv.commit()
    assert budget.used == 3 * fp8
    kv.append(*rows(2 * PAGE - 1))
    assert budget.used == 3 * fp8 + 2 * PAGE_BYTES, "of these two pages one is full, and committed they are not"
    with pytest.raises(PoolExhaustedError):
        kv.append(*rows(PAGE, 1))
    assert kv.length == 5 * PAGE - 1 and budget.used == 4 * fp8 + PAGE_BYTES, "the full one was written down on the way"


def test_the_error_names_the_budget_its_limit_and_the_fix():
    whole = Budget(8 * PAGE_BYTES, "KV")
    kv = PagedKV(pool_of(whole), None, Budget(2 * PAGE_BYTES, "session 'law'", whole))
    with pytest.raises(PoolExhaustedError) as told:
        kv.append(*rows(3 * PAGE))
    text = str(told.value)
    assert isinstance(told.value, LongspanError) and "\n" not in text
    assert "session 'law'" in text and size(2 * PAGE_BYTES) in text and "--kv-budget" in text


@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_a_refusal_leaves_everything_as_it_was_and_other_sessions_unharmed(kv_format):
    whole = Budget(12 * PAGE_BYTES, "KV")
    pool = pool_of(whole, kv_format=kv_format, summaries=("lowest",), block=16)
    first, second = (PagedKV(pool, None, Budget(None, name, whole)) for name in ("first", "second"))
    first.append(*rows(5 * PAGE + 10, 1))
    second.append(*rows(2 * PAGE + 30, 2))
    first.commit(), second.commit()
    forked = second.fork(Budget(None, "third", whole))

    def everything():
        reads = [
            [kv.keys(0, kv.length), kv.values(0, kv.length), kv.summary("lowest", 16)] for kv in (first, second, forked)
        ]
        counts = [b.used for b in (whole, first.budget, second.budget, forked.budget)]
        return (
            [part.clone() for read in reads for part in read],
            counts,
            [list(kv.table) for kv in (first, second, forked)],
        )

    before = everything()
    with pytest.raises(PoolExhaustedError, match="KV budget"):
        forked.append(*rows(100 * PAGE, 3))
    after = everything()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)) and before[1:] == after[1:]
    forked.free()
    first.append(*rows(2 * PAGE, 4))
    second.append(*rows(1, 5))


def test_a_page_that_forks_share_is_counted_once_in_all_and_once_for_each():
    whole = Budget(None, "KV")
    pool = pool_of(whole)
    mine, theirs = Budget(None, "mine", whole), Budget(4 * PAGE_BYTES, "theirs", whole)
    kv = PagedKV(pool, None, mine)
    kv.append(*rows(3 * PAGE + 5))
    other = kv.fork(theirs)
    assert (whole.used, mine.used, theirs.used) == (4 * PAGE_BYTES,) * 3
    other.append(*rows(1))
    assert (whole.used, mine.used, theirs.used) == (5 * PAGE_BYTES, 4 * PAGE_BYTES, 4 * PAGE_BYTES)
    with pytest.raises(PoolExhaustedError, match="theirs"):
        other.append(*rows(PAGE))
    kv.free()
    assert (whole.used, mine.used, theirs.used) == (4 * PAGE_BYTES, 0, 4 * PAGE_BYTES)
    with pytest.raises(PoolExhaustedError, match="small"):
        other.fork(Budget(3 * PAGE_BYTES, "small", whole))
    other.free()
    assert whole.used == theirs.used == 0 and pool.free == pool.slots


def test_a_budget_below_one_page_is_refused():
    with pytest.raises(UsageError, match=r"below one page of a layer.*--kv-budget"):
        pool_of(Budget(PAGE_BYTES - 1))
    pool_of(Budget(PAGE_BYTES))
    whole = Budget(10 * PAGE_BYTES)
    with pytest.raises(UsageError, match="the tiny budget"):
        PagedKV(pool_of(whole), None, Budget(PAGE_BYTES - 1, "tiny", whole))
    with pytest.raises(UsageError, match="holds nothing"):
        Budget(0)


def test_demoting_makes_room_that_promoting_needs():
    budget = Budget(4 * PAGE_BYTES)
    pool = pool_of(budget, summaries=(), block=PAGE)
    kv = PagedKV(pool)
    k, v = rows(4 * PAGE)
    kv.append(k, v)
    kv.commit()
    with pytest.raises(PoolExhaustedError):
        kv.append(*rows(1))
    kv.demote([0, 1, 2], "fp8", keep_exact=True)
    assert budget.used < 2 * PAGE_BYTES
    kv.append(*rows(2 * PAGE))
    used = budget.used
    with pytest.raises(PoolExhaustedError):
        kv.promote([0, 1])
    assert budget.used == used and [kv.resolution(page) for page in (0, 1, 2)] == ["fp8"] * 3
    kv.truncate(4 * PAGE)
    kv.promote([0, 1, 2])
    assert torch.equal(kv.keys(0, 4 * PAGE), k) and torch.equal(kv.values(0, 4 * PAGE), v)
    assert budget.used == 4 * PAGE_BYTES and not any(any(below.references) for below in pool.below)


def test_compacting_gives_memory_back_and_moves_no_content():
    budget = Budget(40 * PAGE_BYTES)
    pool = pool_of(budget)
    first, second = PagedKV(pool), PagedKV(pool)
    kept = []
    for i in range(8):
        kept.append(rows(PAGE, i))
        first.append(*rows(PAGE, 100 + i))
        second.append(*kept[-1])
    other = second.fork()
    first.free()
    pool.compact()
    assert pool.slots == 8 and pool.nbytes == budget.reserved == 8 * PAGE_BYTES
    wanted = torch.cat([k for k, _ in kept], 2)
    assert torch.equal(second.keys(0, 8 * PAGE), wanted) and torch.equal(other.keys(0, 8 * PAGE), wanted)
    second.free()
    third = PagedKV(pool)
    third.append(*rows(9 * PAGE))
    assert torch.equal(other.keys(0, 8 * PAGE), wanted), "the fork still holds what both did"
    other.free()
    third.free()
    assert budget.used == 0 and pool.free == pool.slots


def test_memory_of_a_pool_that_is_gone_is_no_longer_set_aside():
    budget = Budget(100 * PAGE_BYTES)
    kv = PagedKV(pool_of(budget))
    kv.append(*rows(PAGE))
    assert budget.reserved > 0 and budget.planes > 0
    kv.free()
    del kv
    gc.collect()
    assert budget.reserved == 0 and budget.planes == 0 and budget.used == 0


def test_sizes_are_read_easily():
    assert [size(n) for n in (17, 1024, 1536, 3 * 2**30, 5 * 2**50)] == [
        "17 bytes", "1 KiB", "1.5 KiB", "3 GiB", "5120 TiB",
    ]  # fmt: skip
