"""Pages against a plain list: contents, slots, bounds, rotated keys, and what goes to a file and comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import SessionCorruptError, UsageError
from longspan.kv.base import PAGE, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.tables import SlotTable

HEADS, DIM, VALUE_DIM = 2, 4, 3
ROTARY = Rotary(torch.tensor([1.0, 0.1]))


def key_of(tokens):
    """Keys `[1, 2, n, 4]` that differ for every token, head and channel, and neither rise nor fall."""
    at = torch.tensor(tokens, dtype=torch.float64).view(1, 1, -1, 1)
    return torch.sin(at * 1.7 + torch.arange(HEADS).view(-1, 1, 1) * 10 + torch.arange(DIM) * 3.1)


def value_of(tokens):
    at = torch.tensor(tokens, dtype=torch.float64).view(1, 1, -1, 1)
    return torch.cos(at * 2.3 + torch.arange(HEADS).view(-1, 1, 1) * 7 + torch.arange(VALUE_DIM) * 1.9)


def new_pool():
    return PagePool(HEADS, DIM, VALUE_DIM, torch.float64, torch.device("cpu"))


class Checked:
    """Pages beside the list of what they should hold."""

    def __init__(self):
        self.kv = PagedKV(new_pool(), ROTARY)
        self.tokens, self.dropped, self.next, self.known = [], set(), 0, {PAGE: 0, 16: 0, 2 * PAGE: 0}

    def append(self, count):
        if len(self.tokens) % PAGE and len(self.tokens) // PAGE in self.dropped:
            return  # cut back into a dropped page: it can't be continued
        new = list(range(self.next, self.next + count))
        self.next += count
        self.kv.append(key_of(new), value_of(new))
        self.tokens += new

    def truncate(self, share):
        length = int(len(self.tokens) * share)
        self.kv.truncate(length)
        del self.tokens[length:]
        self.dropped = {page for page in self.dropped if page * PAGE < length}
        self.known = {block: min(count, length // block) for block, count in self.known.items()}

    def drop(self, shares):
        start, stop = sorted(int(len(self.tokens) * share) for share in shares)
        self.kv.drop(start, stop)
        self.dropped |= {page for page in range(len(self.tokens) // PAGE) if start <= page * PAGE <= stop - PAGE}

    def restore(self, fresh):
        saved = {name: tensor.clone() for name, tensor in self.kv.tensors("x.").items()}
        if fresh:
            self.kv = PagedKV(new_pool(), ROTARY)
        self.kv.restore("x.", len(self.tokens), saved)

    def check(self):
        kv, pool, length = self.kv, self.kv.pool, len(self.tokens)
        used = [slot for slot in kv.table if slot >= 0]
        assert sorted(used + pool.native.free_slots) == list(range(pool.slots)), "a slot is lost, or used twice"
        assert kv.length == length
        assert kv.pages_held == len(used) == -(-length // PAGE) - len(self.dropped)
        poison(kv)
        start = 0
        while start < length:
            if start // PAGE in self.dropped:
                start += PAGE
                continue
            stop = start
            while stop < length and stop // PAGE not in self.dropped:
                stop = min(stop + PAGE, length)
            self.check_range(start, stop)
            start = stop
        self.check_summaries()

    def check_range(self, start, stop):
        kv = self.kv
        inner = (start + (stop - start) // 3, stop - (stop - start) // 5)
        for a, b in [(start, stop), inner, (start, start)]:
            wanted = self.tokens[a:b]
            assert torch.equal(kv.keys(a, b), key_of(wanted))
            assert torch.equal(kv.values(a, b), value_of(wanted))
            rotated = ROTARY(key_of(wanted), torch.arange(a, b))
            torch.testing.assert_close(kv.keys_at_own_positions(a, b), rotated, atol=1e-12, rtol=0)
        index = torch.tensor([[stop - 1, start], [(start + stop) // 2, start]])
        wanted = [self.tokens[i] for i in index.flatten()]
        assert torch.equal(kv.gather_keys(index), key_of(wanted).unflatten(2, (2, 2)))
        assert torch.equal(kv.gather_values(index), value_of(wanted).unflatten(2, (2, 2)))

    def check_summaries(self):
        for block, known in self.known.items():
            blocks = len(self.tokens) // block
            # A summary that the pool does not keep must be asked for before a page of its block is dropped.
            if any(page in self.dropped for page in range(known * block // PAGE, -(-blocks * block // PAGE))):
                continue
            self.known[block] = blocks
            k, v = key_of(self.tokens[: blocks * block]), value_of(self.tokens[: blocks * block])
            rotated = ROTARY.range(k, 0)
            for what, rows in (("lowest", k), ("highest_rotated", rotated), ("mean_key", k), ("mean_value", v)):
                expected = plain_summary(what, rows.unflatten(2, (blocks, block)))
                torch.testing.assert_close(self.kv.summary(what, block), expected, atol=1e-12, rtol=0)


def plain_summary(what, blocks):
    """Token by token, `[..., n, D]` of blocks `[..., n, block, D]`."""
    out = blocks[..., 0, :].clone()
    for i in range(1, blocks.shape[-2]):
        row = blocks[..., i, :]
        out = torch.minimum(out, row) if "low" in what else torch.maximum(out, row) if "high" in what else out + row
    return out / blocks.shape[-2] if "mean" in what else out


def poison(kv):
    """Fill whatever holds no token with NaN, so that reading it shows."""
    for tensor in (kv.pool.keys, kv.pool.values):
        tensor[:, kv.pool.native.free_slots] = float("nan")
        if kv.length % PAGE and kv.table[-1] >= 0:
            tensor[:, kv.table[-1], kv.length % PAGE :] = float("nan")


SHARE = st.floats(0, 1)
OPERATION = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 200)),
    st.tuples(st.just("append"), st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE])),
    st.tuples(st.just("truncate"), SHARE),
    st.tuples(st.just("drop"), st.tuples(SHARE, SHARE)),
    st.tuples(st.just("restore"), st.booleans()),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(OPERATION, min_size=1, max_size=12))
def test_pages_hold_what_a_list_would(operations):
    checked = Checked()
    for name, argument in operations:
        getattr(checked, name)(argument)
        checked.check()


def filled(length, rotary=ROTARY):
    kv = PagedKV(new_pool(), rotary)
    kv.append(key_of(range(length)), value_of(range(length)))
    return kv


def test_neighbouring_slots_are_read_without_a_copy():
    kv = filled(5 * PAGE)
    assert kv.keys(70, 200).data_ptr() == kv.pool.keys[:, 1, 6].data_ptr()
    kv.truncate(0)
    kv.pool.native.free_slots.sort()  # the highest slot is taken first from here on
    kv.append(key_of(range(200)), value_of(range(200)))
    assert kv.table != sorted(kv.table)
    assert torch.equal(kv.keys(70, 200), key_of(range(70, 200)))


def test_every_page_comes_back_when_a_context_is_emptied():
    kv = filled(1000)
    slots = kv.pool.slots
    for _ in range(5):
        kv.drop(100, 900)
        kv.truncate(0)
        assert kv.pool.free == slots and kv.table == []
        kv.append(key_of(range(1000)), value_of(range(1000)))
    assert kv.pool.slots == slots, "the pool grew although as much was free"


def test_a_context_can_only_be_cut_to_a_length_it_had():
    kv = filled(100)
    for length in (101, -1):
        with pytest.raises(UsageError, match="100 tokens"):
            kv.truncate(length)
    assert kv.length == 100
    assert torch.equal(kv.keys(0, 100), key_of(range(100)))


def test_reading_a_dropped_page_is_refused():
    kv = filled(4 * PAGE)
    kv.drop(PAGE - 1, 2 * PAGE + 1)
    assert kv.pages_held == 3
    for read in (
        lambda: kv.keys(0, PAGE + 1),
        lambda: kv.values(2 * PAGE - 1, 3 * PAGE),
        lambda: kv.gather_keys(torch.tensor([0, PAGE])),
        lambda: kv.gather_values(torch.tensor([2 * PAGE - 1])),
    ):
        with pytest.raises(AssertionError, match="dropped"):
            read()
    assert torch.equal(kv.keys(0, PAGE), key_of(range(PAGE)))


def test_summaries_follow_truncation_and_new_tokens():
    kv = filled(3 * PAGE)
    kv.summary("lowest"), kv.summary("highest", 16)
    kv.truncate(PAGE + 5)
    assert kv.summary("lowest").shape[2] == 1 and kv.summary("highest", 16).shape[2] == 4
    kv.append(10 + key_of(range(2 * PAGE)), value_of(range(2 * PAGE)))
    held = torch.cat([key_of(range(PAGE + 5)), 10 + key_of(range(2 * PAGE))], 2)[:, :, : 3 * PAGE]
    assert torch.equal(kv.summary("lowest"), held.unflatten(2, (3, PAGE)).amin(3))
    assert torch.equal(kv.summary("highest", 16), held.unflatten(2, (12, 16)).amax(3))
    plain = TensorKV(held, held)
    assert torch.equal(plain.summary("lowest"), kv.summary("lowest"))
    assert torch.equal(plain.summary("highest", 16), kv.summary("highest", 16))


def test_rotated_keys_are_not_kept_beyond_a_truncation():
    kv = filled(300)
    kv.keys_at_own_positions(0, 300)
    kv.truncate(130)
    kv.append(key_of(range(1000, 1300)), value_of(range(1000, 1300)))
    held = [*range(130), *range(1000, 1300)]
    expected = ROTARY.range(key_of(held), 0)
    torch.testing.assert_close(kv.keys_at_own_positions(0, 200), expected[:, :, :200], atol=1e-12, rtol=0)
    torch.testing.assert_close(kv.keys_at_own_positions(0, 430), expected, atol=1e-12, rtol=0)


def test_rotated_keys_are_not_kept_beyond_a_restoration():
    kv, other = filled(300), PagedKV(new_pool(), ROTARY)
    kv.keys_at_own_positions(0, 300)
    other.append(key_of(range(500, 900)), value_of(range(500, 900)))
    kv.restore("", 400, other.tensors(""))
    expected = ROTARY.range(key_of(range(500, 900)), 0)
    torch.testing.assert_close(kv.keys_at_own_positions(0, 400), expected, atol=1e-12, rtol=0)


def test_positions_that_are_not_encoded_leave_keys_as_they_are():
    kv = filled(100, rotary=None)
    assert torch.equal(kv.keys_at_own_positions(0, 100), key_of(range(100)))
    assert torch.equal(kv.queries_at(key_of(range(5)), torch.arange(50, 55)), key_of(range(5)))


def test_what_is_saved_is_the_held_pages_and_zeros():
    kv = filled(4 * PAGE + 10)
    kv.drop(PAGE, 3 * PAGE)
    poison(kv)
    saved = kv.tensors("7.")
    assert set(saved) == {"7.pages", "7.k", "7.v"}
    assert saved["7.pages"].tolist() == [0, 3, 4]
    held = [*range(PAGE), *range(3 * PAGE, 4 * PAGE + 10)]
    assert torch.equal(saved["7.k"].flatten(1, 2)[None, :, : 2 * PAGE + 10], key_of(held))
    assert torch.equal(saved["7.v"].flatten(1, 2)[None, :, : 2 * PAGE + 10], value_of(held))
    assert (saved["7.k"][:, -1, 10:] == 0).all() and (saved["7.v"][:, -1, 10:] == 0).all()
    assert kv.pool.keys[:, kv.table[-1], 10:].isnan().all(), "saving must not write to the pages"


def test_what_is_saved_of_a_context_cut_back_into_a_dropped_page_is_whole():
    kv = filled(3 * PAGE)
    kv.drop(PAGE, 2 * PAGE)
    kv.truncate(PAGE + 10)
    saved = kv.tensors("")
    assert saved["pages"].tolist() == [0]
    assert torch.equal(saved["k"].flatten(1, 2)[None], key_of(range(PAGE)))
    assert torch.equal(saved["v"].flatten(1, 2)[None], value_of(range(PAGE)))


def test_an_empty_context_is_saved_and_restored():
    kv = filled(100)
    kv.restore("", 0, PagedKV(new_pool()).tensors(""))
    assert kv.length == 0 and kv.pages_held == 0 and kv.pool.free == kv.pool.slots


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("pages"),
        lambda t: t.pop("k"),
        lambda t: t.pop("v"),
        lambda t: t.update(k=t["k"][:1]),
        lambda t: t.update(k=t["k"][:, :-1]),
        lambda t: t.update(k=t["k"][..., :-1]),
        lambda t: t.update(v=t["v"][:, :, :-1]),
        lambda t: t.update(v=t["v"][..., :-1]),
        lambda t: t.update(pages=t["pages"] + 1),
        lambda t: t.update(pages=t["pages"] - 1),
        lambda t: t.update(pages=t["pages"][:-1]),
        lambda t: t.update(pages=torch.zeros_like(t["pages"])),
    ],
)
def test_saved_pages_that_do_not_fit_are_refused_and_change_nothing(spoil):
    saved = dict(filled(3 * PAGE).tensors(""))
    spoil(saved)
    kv = filled(100)
    with pytest.raises(SessionCorruptError, match="read again"):
        kv.restore("", 3 * PAGE, saved)
    assert torch.equal(kv.keys(0, 100), key_of(range(100)))


def test_saved_pages_of_a_longer_context_are_refused():
    with pytest.raises(SessionCorruptError):
        filled(10).restore("", 2 * PAGE, filled(3 * PAGE).tensors(""))


def test_slots_on_a_device_are_those_of_the_table():
    """Only what is new is copied, whatever was appended, cut, put or moved in between."""
    cpu = torch.device("cpu")
    table, version = SlotTable([4, 5, 6]), 0
    changes = [
        lambda: table.append(9), lambda: table.cut(3), lambda: table.append(1), lambda: table.put(0, 8),
        lambda: table.append(2), lambda: table.cut(2), lambda: table.move({8: 3}), lambda: table.cut(2),
        lambda: (table.append(7), table.append(0)), lambda: table.cut(0), lambda: table.append(5),
    ]  # fmt: skip
    for change in changes:
        before = table.slots.copy()
        change()
        assert table.tensor(cpu).tolist() == table.slots
        kept = table.slots[: len(before)] == before
        assert (table.version == version) == kept
        version = table.version
