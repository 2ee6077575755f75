"""What is saved of pages in several formats comes back, with the summaries of what can't be read any more."""

import pytest
import torch
from test_pages import DIM, HEADS, ROTARY, VALUE_DIM, key_of, plain_summary, value_of

from longspan.errors import PoolExhaustedError, SessionCorruptError
from longspan.kv.base import PAGE, SUMMARIES
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV, PagePool

LENGTH = 6 * PAGE + 37


def new(budget=None, summaries=SUMMARIES, **options):
    pool = PagePool(
        HEADS, DIM, VALUE_DIM, torch.float64, torch.device("cpu"), budget, summaries=summaries, block=16, **options
    )
    return PagedKV(pool, ROTARY)


def mixed(**options):
    """Pages: native, fp8, fp8 with an exact copy, only a summary with one, only a summary, dropped, not full."""
    kv = new(**options)
    kv.append(key_of(range(LENGTH)), value_of(range(LENGTH)))
    kv.commit()
    kv.demote([1], "fp8")
    kv.demote([2], "fp8", keep_exact=True)
    if kv.pool.summaries:
        kv.demote([3], "summary", keep_exact=True)
        kv.demote([4], "summary")
    kv.drop(5 * PAGE, 6 * PAGE)
    return kv


def expected(what, block):
    blocks = LENGTH // block
    rows = value_of(range(blocks * block)) if what == "mean_value" else key_of(range(blocks * block))
    rows = ROTARY.range(rows, 0) if what.endswith("_rotated") else rows
    return plain_summary(what, rows.unflatten(2, (blocks, block)))


@pytest.mark.parametrize("what", SUMMARIES)
@pytest.mark.parametrize("block", [16, 32, PAGE, 2 * PAGE])
@pytest.mark.parametrize("restored", [False, True])
def test_summaries_outlive_what_they_summarise(what, block, restored):
    kv = mixed()
    if restored:
        other = new()
        other.restore("3.", LENGTH, kv.tensors("3."))
        kv = other
    torch.testing.assert_close(kv.summary(what, block), expected(what, block), atol=1e-12, rtol=0)
    kv.truncate(4 * PAGE + 20)
    new_k, new_v = key_of(range(LENGTH, LENGTH + 1)), value_of(range(LENGTH, LENGTH + 1))
    with pytest.raises(AssertionError, match="dropped"):
        kv.append(new_k, new_v)
    wanted = expected(what, block)[:, :, : (4 * PAGE + 20) // block]
    torch.testing.assert_close(kv.summary(what, block), wanted, atol=1e-12, rtol=0)


def test_formats_scales_and_exact_copies_come_back():
    kv, other = mixed(), new()
    other.restore("", LENGTH, kv.tensors(""))
    assert [other.resolution(page) for page in range(7)] == [
        "fp64",
        "fp8",
        "fp8",
        "summary",
        "summary",
        "summary",
        "fp64",
    ]
    assert other.readable().tolist() == [True, True, True, False, False, False, True]
    assert torch.equal(other.keys(0, 3 * PAGE), kv.keys(0, 3 * PAGE))
    assert torch.equal(other.values(6 * PAGE, LENGTH), value_of(range(6 * PAGE, LENGTH)))
    assert not torch.equal(other.keys(2 * PAGE, 3 * PAGE), key_of(range(2 * PAGE, 3 * PAGE)))
    other.promote([2, 3])
    assert torch.equal(other.keys(2 * PAGE, 4 * PAGE), key_of(range(2 * PAGE, 4 * PAGE)))
    with pytest.raises(AssertionError, match="no exact copy"):
        other.promote([4])
    assert other.nbytes == other.pool.budget.used


def test_a_page_that_was_rounded_and_went_on_keeps_its_exact_summaries():
    kv, other = new(), new()
    kv.append(key_of(range(PAGE)), value_of(range(PAGE)))
    kv.commit()
    kv.demote([0], "fp8")
    kv.truncate(40)
    kv.append(key_of(range(40, 50)), value_of(range(40, 50)))
    assert kv.resolution(0) == "fp64" and not torch.equal(kv.keys(0, 40), key_of(range(40)))
    assert torch.equal(kv.keys(40, 50), key_of(range(40, 50)))
    for _ in range(2):
        other.restore("", 50, kv.tensors(""))
        for what in SUMMARIES:
            assert torch.equal(other.summary(what, 16), kv.summary(what, 16))
        # The first two blocks were full before the page was rounded.
        assert torch.equal(other.summary("lowest", 16)[:, :, :2], expected("lowest", 16)[:, :, :2])
        kv, other = other, new()


def test_a_page_that_came_back_rounded_from_host_memory_keeps_its_exact_summaries():
    kv, other = new(kv_format="fp8"), new(kv_format="fp8")
    kv.append(key_of(range(PAGE)), value_of(range(PAGE)))
    kv.commit()
    kv.demote([0], "summary", keep_exact=True)
    kv.truncate(40)
    kv.append(key_of(range(40, 50)), value_of(range(40, 50)))
    assert kv.resolution(0) == "fp64" and not kv.exact and not torch.equal(kv.keys(0, 40), key_of(range(40)))
    other.restore("", 50, kv.tensors(""))
    for what in SUMMARIES:
        assert torch.equal(other.summary(what, 16), kv.summary(what, 16))
    assert torch.equal(other.summary("lowest", 16)[:, :, :2], expected("lowest", 16)[:, :, :2])


def test_copies_in_every_format_come_back_and_name_what_their_codes_mean():
    spec = "int8:group=64,residual=64,sinks=64"
    kv, other = new(kv_format=spec), new(kv_format=spec)
    kv.append(key_of(range(LENGTH)), value_of(range(LENGTH)))
    kv.commit()
    assert [kv.resolution(page) for page in range(7)] == ["fp64", *["int8"] * 4, "fp64", "fp64"]
    keys = kv.keys(0, LENGTH)
    kv.demote([0, 1, 2], "int2", keep_exact=True)
    kv.demote([2, 3], "summary", keep_exact=True)
    saved = kv.tensors("")
    assert {
        "host.pages",
        "host.int8:group=64,rotate=true,keys=0,by=channel.pages",
        "int2:group=32,rotate=true,keys=0,by=channel.pages",
    } < set(saved)
    other.restore("", LENGTH, saved)
    assert [other.resolution(page) for page in range(7)] == [kv.resolution(page) for page in range(7)]
    assert torch.equal(other.keys(0, 2 * PAGE), kv.keys(0, 2 * PAGE))
    other.promote([0, 1, 2, 3])
    assert torch.equal(other.keys(0, LENGTH), keys) and not other.exact
    # A pool with other options reads what it did not write, and writes its own beside.
    third = new(kv_format="int8:rotate=false,residual=0,sinks=0")
    third.restore("", LENGTH, saved)
    third.promote([0, 1, 2, 3])
    assert torch.equal(third.keys(0, LENGTH), keys)
    third.append(key_of(range(100)), value_of(range(100)))
    third.commit()
    assert [third.resolution(page) for page in range(8)] == ["fp64", *["int8"] * 4, "fp64", "int8", "int8"]
    assert third.pool.find(third.table[1])[0] is not third.pool.find(third.table[7])[0]


def test_a_format_that_is_not_known_is_refused():
    saved = mixed().tensors("")
    saved = {name.replace("fp8.", "int3:group=5."): tensor for name, tensor in saved.items()}
    with pytest.raises(SessionCorruptError, match="int3"):
        new().restore("", LENGTH, saved)


def test_summaries_that_were_asked_for_come_back_where_pages_are_gone():
    kv = new(summaries=())
    kv.append(key_of(range(LENGTH)), value_of(range(LENGTH)))
    kv.summary("lowest", 32)
    kv.drop(PAGE, 3 * PAGE)
    other = new(summaries=())
    other.restore("", LENGTH, kv.tensors(""))
    torch.testing.assert_close(other.summary("lowest", 32), expected("lowest", 32), atol=0, rtol=0)
    with pytest.raises(AssertionError, match="dropped"):
        other.summary("highest", 32)  # nobody asked for it in time


def test_a_kind_that_the_pool_was_not_made_for_is_computed_once_and_kept_up_to_date():
    kv = new(summaries=("lowest",))
    for start in range(0, LENGTH, 29):
        stop = min(start + 29, LENGTH)
        kv.append(key_of(range(start, stop)), value_of(range(start, stop)))
        if start == 87:
            kv.summary("mean_key", 16)
    assert torch.equal(kv.summary("lowest", 16), expected("lowest", 16))
    torch.testing.assert_close(kv.summary("mean_key", 16), expected("mean_key", 16), atol=1e-12, rtol=0)
    assert kv.summary("mean_key", 16) is kv.summary("mean_key", 16)
    assert kv.summary("lowest", 16).data_ptr() == kv.pool.marks.tensors["lowest"].data_ptr(), "a view costs nothing"


def test_restoring_into_a_pool_of_another_format_keeps_what_was_saved():
    kv, other = mixed(), new(kv_format="fp8")
    other.restore("", LENGTH, kv.tensors(""))
    assert torch.equal(other.keys(0, 3 * PAGE), kv.keys(0, 3 * PAGE))
    other.append(key_of(range(100)), value_of(range(100)))
    other.commit()
    assert other.resolution(6) == "fp8" and other.resolution(0) == "fp64"


def test_a_budget_too_small_for_what_was_saved_refuses_it_and_changes_nothing():
    saved = mixed().tensors("")
    least = new().pool.least_bytes
    other = new(Budget(3 * least))
    other.append(key_of(range(100)), value_of(range(100)))
    with pytest.raises(PoolExhaustedError):
        other.restore("", LENGTH, saved)
    assert torch.equal(other.keys(0, 100), key_of(range(100))) and other.pool.budget.used == 2 * least


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("fp8.k_scale"),
        lambda t: t.update({"fp8.k": t["fp8.k"][:, :1]}),
        lambda t: t.update({"fp8.v_scale": t["fp8.v_scale"][:1]}),
        lambda t: t.update({"fp8.pages": t["fp8.pages"] + 5}),
        lambda t: t.update({"fp8.pages": t["fp8.pages"] - 1}),  # page 0 twice
        lambda t: t.update({"fp8.pages": t["fp8.pages"].flip(0)}),
        lambda t: t.pop("host.v"),
        lambda t: t.update({"host.pages": t["host.pages"] + 9}),
        lambda t: t.pop("marks.lowest"),
        lambda t: t.update({"marks.mean_value": t["marks.mean_value"][..., :-1]}),
        lambda t: t.update({"asked.lowest.x": torch.zeros(HEADS, 1, DIM)}),
        lambda t: t.update({"asked.lowest.16": torch.zeros(HEADS, 1, DIM + 1)}),
        lambda t: t.update({"asked.lowest.16": torch.zeros(HEADS, 100, DIM)}),
    ],
)
def test_damaged_parts_are_refused_and_change_nothing(spoil):
    saved = mixed().tensors("")
    spoil(saved)
    other = new()
    other.append(key_of(range(100)), value_of(range(100)))
    with pytest.raises(SessionCorruptError, match="read again"):
        other.restore("", LENGTH, saved)
    assert torch.equal(other.keys(0, 100), key_of(range(100)))
