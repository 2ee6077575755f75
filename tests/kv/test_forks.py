"""Forks share every page and the rotated keys, and no writer spoils another's."""

import torch
from test_pages import DIM, HEADS, ROTARY, VALUE_DIM, key_of, new_pool, value_of

from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV, PagePool


def filled(tokens, pool=None, budget=None):
    kv = PagedKV(pool or new_pool(), ROTARY, budget)
    kv.append(key_of(tokens), value_of(tokens))
    return kv


def check(kv, tokens):
    count = len(tokens)
    assert kv.length == count
    assert torch.equal(kv.keys(0, count), key_of(tokens)) and torch.equal(kv.values(0, count), value_of(tokens))
    rotated = ROTARY.range(key_of(tokens), 0)
    for start in (count // 2, count // 3, count - 1):  # windows, before and after the whole was read
        torch.testing.assert_close(kv.keys_at_own_positions(start, count), rotated[:, :, start:], atol=1e-12, rtol=0)
    torch.testing.assert_close(kv.keys_at_own_positions(0, count), rotated, atol=1e-12, rtol=0)
    for part in (count // 2, count):
        assert torch.equal(kv.columns(part, rotated=False), key_of(tokens)[:, :, :part].mT)
        torch.testing.assert_close(kv.columns(part, rotated=True), rotated[:, :, :part].mT, atol=1e-12, rtol=0)
    index = torch.tensor([[[count - 1, 0, count // 2], [1, count - 2, count // 3]]])
    wanted = torch.stack([rotated[:, head, index[0, head]] for head in range(HEADS)], 1)
    torch.testing.assert_close(kv.gather(index, rotated=True)[0], wanted, atol=1e-12, rtol=0)


def test_a_fork_copies_nothing_and_goes_its_own_way():
    base = list(range(3 * PAGE + 10))
    kv = filled(base)
    check(kv, base)
    slots = kv.pool.slots - kv.pool.free
    other = kv.fork()
    assert kv.pool.slots - kv.pool.free == slots and other.table == kv.table
    assert other.keys(0, 200).data_ptr() == kv.keys(0, 200).data_ptr()
    other.append(key_of(range(1000, 1100)), value_of(range(1000, 1100)))
    assert other.table[:3] == kv.table[:3] and other.table[3] != kv.table[3]
    kv.append(key_of(range(2000, 2005)), value_of(range(2000, 2005)))
    check(kv, base + list(range(2000, 2005)))
    check(other, base + list(range(1000, 1100)))


def test_rotated_keys_of_forks_do_not_mix():
    base = list(range(200))
    kv = filled(base)
    check(kv, base)
    forks = [kv.fork() for _ in range(3)]
    held = [list(base) for _ in range(4)]
    everyone = [kv, *forks]
    gen = torch.Generator().manual_seed(0)
    for step in range(40):
        which = int(torch.randint(4, (1,), generator=gen))
        one, tokens = everyone[which], held[which]
        if step % 5 == 4:
            cut = int(torch.randint(100, len(tokens), (1,), generator=gen))
            one.truncate(cut)
            del tokens[cut:]
        new = list(range(1000 * step + 1000, 1000 * step + 1000 + int(torch.randint(1, 90, (1,), generator=gen))))
        one.append(key_of(new), value_of(new))
        tokens += new
        for other, wanted in zip(everyone, held, strict=True):
            if step % 3 == 0 or other is one:
                check(other, wanted)


def test_rotated_keys_have_room_for_what_was_reserved_and_no_more():
    kv = filled(range(200))
    kv.mirror.reserve(5 * PAGE)
    assert kv.mirror.nbytes == 0, "nothing is held before it is read"
    first = kv.keys_at_own_positions(0, 200).data_ptr()
    assert kv.mirror.held.shape[2] == 5 * PAGE
    kv.append(key_of(range(200, 5 * PAGE)), value_of(range(200, 5 * PAGE)))
    check(kv, list(range(5 * PAGE)))
    assert kv.keys_at_own_positions(0, 5 * PAGE).data_ptr() == first
    kv.mirror.reserve(6 * PAGE)
    assert kv.mirror.held.shape[2] == 6 * PAGE
    check(kv, list(range(5 * PAGE)))


def test_only_the_one_that_goes_on_copies_rotated_keys():
    kv = filled(range(200))
    kv.keys_at_own_positions(0, 200)
    other = kv.fork()
    assert other.keys_at_own_positions(0, 200).data_ptr() == kv.keys_at_own_positions(0, 200).data_ptr()
    other.append(key_of([900]), value_of([900]))
    # Nobody wrote behind token 200 yet, so the fork may.
    assert other.keys_at_own_positions(0, 201).data_ptr() == kv.keys_at_own_positions(0, 200).data_ptr()
    kv.append(key_of([901]), value_of([901]))
    assert other.keys_at_own_positions(0, 201).data_ptr() != kv.keys_at_own_positions(0, 201).data_ptr()


def test_a_window_that_moves_on_is_rotated_once(monkeypatch):
    kv, turned = filled(range(300)), []
    turn = ROTARY.range
    monkeypatch.setattr(ROTARY, "range", lambda x, start: turned.append(x.shape[2]) or turn(x, start))
    for length in range(300, 2600):
        found = kv.keys_at_own_positions(length - 200, length)
        if length % 400 == 0:
            kv.drop(0, length - 200)  # which forgets the window too
            torch.testing.assert_close(found, turn(key_of(range(length - 200, length)), length - 200))
        kv.append(key_of([length]), value_of([length]))
    assert sum(turned) < 2300 + 8 * 200, "more than the new keys, and each window that began anew"


def test_rotated_keys_are_kept_only_where_memory_is_free_and_pages_are_as_they_came():
    free, limited = filled(range(200)), filled(range(200), *limited_pool())
    for kv, kept in ((free, True), (limited, False)):
        first = kv.keys_at_own_positions(0, 200)
        assert (kv.keys_at_own_positions(0, 200).data_ptr() == first.data_ptr()) == kept
        check(kv, list(range(200)))
    free.commit()
    free.demote([1], "fp32")
    assert not free.mirrored
    free.truncate(PAGE)
    assert free.mirrored
    check(free, list(range(PAGE)))


def limited_pool():
    budget = Budget(2**30)
    return PagePool(HEADS, DIM, VALUE_DIM, torch.float64, torch.device("cpu"), budget), budget


def test_a_question_is_taken_back_to_the_bit_although_it_closed_a_page():
    pool = PagePool(HEADS, DIM, VALUE_DIM, torch.float64, torch.device("cpu"), kv_format="fp8")
    kv = filled(range(PAGE + 40), pool)
    kv.commit()
    before = kv.keys(0, PAGE + 40).clone(), kv.values(0, PAGE + 40).clone(), pool.slots - pool.free
    assert torch.equal(before[0][:, :, PAGE:], key_of(range(PAGE, PAGE + 40))), "a page that is not full is exact"
    for question in (30, 24, 300, 1):
        new = range(1000, 1000 + question)
        kv.append(key_of(new), value_of(new))
        for token in range(100):  # the answer, token by token
            kv.append(key_of([5000 + token]), value_of([5000 + token]))
        held = [kv.resolution(page) for page in range(len(kv.table))]
        whole = (kv.length - 1) // PAGE  # by the last token of the answer, which came alone
        assert held == ["fp8", "fp64", *["fp8"] * (whole - 2), *["fp64"] * (len(held) - max(2, whole))]
        kv.truncate(PAGE + 40)
        assert kv.resolution(1) == "fp64"
        assert torch.equal(kv.keys(0, PAGE + 40), before[0]) and torch.equal(kv.values(0, PAGE + 40), before[1])
        assert pool.slots - pool.free == before[2], "nothing is kept of the question"
    kv.append(key_of(range(100)), value_of(range(100)))
    kv.commit()
    assert sum(pool.native.references) == 1


def test_only_committed_pages_are_demoted():
    import pytest

    kv = filled(range(3 * PAGE))
    with pytest.raises(AssertionError, match="committed"):
        kv.demote([1], "fp8")
    kv.commit()
    kv.demote([1], "fp8")
    assert kv.resolution(1) == "fp8"


def test_a_shared_page_is_demoted_for_one_and_stays_for_the_other():
    kv = filled(range(3 * PAGE))
    kv.commit()
    other = kv.fork()
    kv.demote([0, 2], "fp8")
    assert [kv.resolution(page) for page in range(3)] == ["fp8", "fp64", "fp8"]
    assert [other.resolution(page) for page in range(3)] == ["fp64"] * 3
    check(other, list(range(3 * PAGE)))
    assert not torch.equal(kv.keys(0, PAGE), other.keys(0, PAGE))
    torch.testing.assert_close(kv.keys(0, PAGE), other.keys(0, PAGE), atol=1 / 16, rtol=1 / 16)
