"""What a mechanism remembers beside pages: cut back, forked, saved and counted with them."""

import pytest
import torch

from longspan.errors import PoolExhaustedError, SessionCorruptError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.memory import LayerMemory
from longspan.kv.pages import PagedKV, PagePool

SHAPES = {"M": (1, 2, 4, 3), "z": (1, 2, 4)}
SIZE = 4 * (24 + 8)
PAGE_BYTES = 2 * PAGE * (4 + 3) * 4


def state(seed):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=gen) for name, shape in SHAPES.items()}


def paged(budget=None, shapes=SHAPES):
    root = Budget() if budget is None else budget.root
    kv = PagedKV(PagePool(2, 4, 3, torch.float32, torch.device("cpu"), root), budget=budget)
    if shapes:
        kv.memory = LayerMemory("mine", shapes, torch.float32, torch.device("cpu"), kv.budget)
    return kv


def add(kv, tokens, seed=0):
    gen = torch.Generator().manual_seed(seed)
    kv.append(torch.randn(1, 2, tokens, 4, generator=gen), torch.randn(1, 2, tokens, 3, generator=gen))


def held(kv):
    latest = kv.memory.latest()
    return None if latest is None else {name: tensor.clone() for name, tensor in latest.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def read(kv, *steps):
    """Add so many tokens at a time for good, remembering all but the newest page."""
    for i, tokens in enumerate(steps):
        add(kv, tokens, i)
        seen = (kv.length - 1) // PAGE * PAGE
        if seen > kv.memory.length:
            kv.memory.update(seen, state(seen))
        kv.commit()
        kv.drop(0, seen)
    return kv


def test_what_a_question_added_is_taken_back():
    kv = read(paged(), 150)
    before = held(kv)
    assert kv.memory.length == 128 and same(before, state(128))
    add(kv, 200)
    kv.memory.update(192, state(192))
    kv.memory.update(320, state(320))
    assert same(held(kv), state(320))
    kv.truncate(150)
    assert kv.memory.length == 128 and same(held(kv), before)
    kv.commit()
    kv.truncate(150)
    assert same(held(kv), before)


def test_at_most_two_states_are_kept_however_long_the_context():
    kv = paged()
    for _ in range(30):
        read(kv, 100)
        assert kv.memory.nbytes <= 2 * SIZE
        assert kv.nbytes == kv.pages_held * PAGE_BYTES + kv.memory.nbytes
    assert kv.memory.nbytes == SIZE
    # A state that nothing was committed to takes the place of the one before it.
    add(kv, 1000)
    for length in (3008, 3072, 3136):
        kv.memory.update(length, state(length))
        assert kv.memory.nbytes == 2 * SIZE


def test_a_fork_shares_states_and_goes_its_own_way():
    root = Budget(None, "KV")
    kv = read(paged(Budget(None, "one", root)), 150)
    used = root.used
    child = kv.fork(Budget(None, "other", root))
    assert root.used == used and child.budget.used == child.nbytes == kv.nbytes
    assert child.memory.owner == "mine" and same(held(child), held(kv))
    add(child, 100)
    child.memory.update(192, state(192))
    child.commit()
    assert same(held(kv), state(128)) and same(held(child), state(192))
    assert root.used == used + 2 * PAGE_BYTES + SIZE  # a page, its own copy of the one that was open, a state
    kv.free()
    assert same(held(child), state(192)) and root.used == child.nbytes
    child.free()
    assert root.used == child.budget.used == kv.budget.used == 0


@pytest.mark.parametrize("lack", [1, SIZE, PAGE_BYTES])
def test_a_fork_that_its_budget_does_not_hold_takes_nothing(lack):
    root = Budget(None, "KV")
    kv = read(paged(Budget(None, "one", root)), 150)
    add(kv, 100)
    used, small = root.used, Budget(kv.nbytes - lack, "small", root)
    with pytest.raises(PoolExhaustedError, match="small"):
        kv.fork(small)
    assert (small.used, root.used) == (0, used)
    kv.free()
    assert root.used == 0


def test_states_that_the_budget_does_not_hold_are_refused_and_change_nothing():
    budget = Budget(3 * PAGE_BYTES + SIZE, "KV")
    kv = read(paged(budget), 150)
    add(kv, 130)
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        kv.memory.update(192, state(192))
    assert kv.memory.length == 128 and budget.used == kv.nbytes == 3 * PAGE_BYTES + SIZE
    kv.truncate(150)
    assert budget.used == PAGE_BYTES + SIZE and same(held(kv), state(128))


def test_what_was_saved_is_restored():
    kv = read(paged(), 100, 150)
    saved = {name: tensor.clone() for name, tensor in kv.tensors("7.").items()}
    assert {name for name in saved if "memory" in name} == {"7.memory.192.M", "7.memory.192.z"}
    budget = Budget()
    other = read(paged(budget), 300)  # it held something else
    other.restore("7.", 250, saved)
    assert other.memory.length == 192 and same(held(other), held(kv))
    assert other.nbytes == kv.nbytes == budget.used
    torch.testing.assert_close(other.keys(192, 250), kv.keys(192, 250))
    add(other, 50)
    other.memory.update(256, state(256))
    other.truncate(250)
    assert same(held(other), held(kv))
    other.free()
    assert budget.used == 0


def test_a_state_of_a_question_is_saved_beside_the_one_that_lasts():
    kv = read(paged(), 192)
    add(kv, 5)
    kv.memory.update(192, state(192))
    kv.truncate(192)
    other = paged()
    other.restore("", 192, kv.tensors(""))
    assert other.memory.length == 192 and same(held(other), state(192))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: [t.pop(name) for name in list(t) if "memory" in name],
        lambda t: t.pop("memory.192.M"),
        lambda t: t.pop("memory.192.z"),
        lambda t: t.update({"memory.192.z": t["memory.192.z"][:, :1]}),
        lambda t: t.update({"memory.192.z": t["memory.192.z"].double()}),
        lambda t: t.update({"memory.192.w": t["memory.192.z"]}),
        lambda t: t.update({"memory.x.z": t["memory.192.z"]}),
        lambda t: t.update({f"memory.256.{part}": t[f"memory.192.{part}"] for part in SHAPES}),
        lambda t: t.update({f"memory.64.{part}": t.pop(f"memory.192.{part}") for part in SHAPES}),
        lambda t: t.update({f"memory.0.{part}": t[f"memory.192.{part}"] for part in SHAPES}),
    ],
)
def test_saved_memory_that_does_not_fit_is_refused_and_changes_nothing(spoil):
    saved = dict(read(paged(), 100, 150).tensors(""))
    spoil(saved)
    budget = Budget()
    kv = read(paged(budget), 140)
    before, used = held(kv), budget.used
    with pytest.raises(SessionCorruptError, match="read again"):
        kv.restore("", 250, saved)
    assert kv.length == 140 and same(held(kv), before) and budget.used == used


def test_a_context_that_keeps_nothing_beside_pages_has_no_memory():
    kv = paged(shapes=None)
    add(kv, 150)
    assert kv.memory is None and not any("memory" in name for name in kv.tensors(""))
    other = paged(shapes=None)
    other.restore("", 150, kv.tensors(""))
    assert other.memory is None and other.fork().memory is None
    # One that would remember finds every token still in pages.
    third = paged()
    third.restore("", 150, kv.tensors(""))
    assert third.memory.length == 0 and third.memory.latest() is None


def test_a_state_of_another_shape_is_our_fault():
    kv = paged()
    add(kv, 100)
    with pytest.raises(AssertionError):
        kv.memory.update(64, {"M": torch.zeros(1, 2, 4, 4), "z": torch.zeros(1, 2, 4)})
    with pytest.raises(AssertionError):
        kv.memory.update(64, {"M": torch.zeros(1, 2, 4, 3)})
