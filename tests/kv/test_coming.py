"""Pages that are still in a file come when they are read, each once, whoever asks, and are checked."""

import threading
import time

import pytest
import torch

from longspan.errors import SessionCorruptError
from longspan.kv import coming
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.coming import Arrivals
from longspan.kv.formats import format_for
from longspan.kv.planes import PagePlane

HEADS, DIM, PAGES = 2, 8, 40


class Filed:
    """A tensor of pages that notes what was read, and fails where it is told to."""

    here = False

    def __init__(self, broken=(), seconds=0.0):
        self.tensor = torch.rand(HEADS, PAGES, PAGE, DIM)
        self.shape, self.dtype, self.broken, self.seconds = tuple(self.tensor.shape), torch.float32, broken, seconds
        self.read_pages = []

    def read(self, first, last):
        time.sleep(self.seconds)
        if any(first <= page < last for page in self.broken):
            raise SessionCorruptError("a page fails its checksum")
        self.read_pages += range(first, last)
        return self.tensor[:, first:last].clone()

    def read_into(self, first, last, target, start):
        target[:, start : start + last - first] = self.read(first, last)


def filed(slots=None, **how):
    """A plane of which slots are to come from files."""
    plane = PagePlane(0, format_for(torch.float32), HEADS, {"k": DIM, "v": DIM}, torch.device("cpu"), Budget())
    plane.reserve(PAGES + 8)
    taken = plane.take(PAGES)
    files = {"k": Filed(**how), "v": Filed(**how)}
    order = taken if slots is None else slots
    for tensor in plane.tensors.values():
        tensor.fill_(torch.nan)
    plane.expect(order, files)
    return plane, files, order


@pytest.fixture(autouse=True)
def few_together(monkeypatch):
    monkeypatch.setattr(coming, "PIECE", 5 * HEADS * PAGE * DIM * 4)
    monkeypatch.setattr(coming, "_GAP", 0)


def test_pages_between_two_that_are_asked_for_come_along(monkeypatch):
    monkeypatch.setattr(coming, "_GAP", 2 * HEADS * PAGE * DIM * 4)
    plane, files, slots = filed([*range(0, 20), *range(22, PAGES + 2)])
    plane.need([1])
    plane.need([0, 3, 7, 18, 23], "k")  # no other page lies between 19 and 22, and none is that of a slot there
    assert files["k"].read_pages == [1, 0, 1, 2, 3, 7, 18, 21]
    assert torch.isnan(plane.tensors["k"][:, 4:7]).all()
    plane.need(None)
    for what in ("k", "v"):
        assert torch.equal(plane.tensors[what][:, slots], files[what].tensor)
        assert torch.isnan(plane.tensors[what][:, 20:22]).all()


@pytest.mark.parametrize("order", [None, list(reversed(range(PAGES))), [*range(20, PAGES), *range(20)]])
def test_only_what_is_asked_for_comes_and_only_once(order):
    plane, files, slots = filed(order)
    page = {slot: i for i, slot in enumerate(slots)}
    for asked in (slice(3, 5), torch.tensor([[4, 9], [9, 30]]), slice(0, 10)):
        found = plane.read(asked, "k", torch.float32)
        which = range(asked.start, asked.stop) if isinstance(asked, slice) else asked.flatten().tolist()
        wanted = files["k"].tensor[:, [page[slot] for slot in which]]
        assert torch.equal(found.flatten(1), wanted.flatten(1))
    assert sorted(files["k"].read_pages) == sorted(page[slot] for slot in {*range(10), 30})
    assert not files["v"].read_pages
    plane.need(None)
    assert torch.equal(plane.tensors["v"][:, slots], files["v"].tensor)
    assert sorted(files["k"].read_pages) == sorted(files["v"].read_pages) == list(range(PAGES))
    assert plane.coming is None


def test_a_page_that_can_not_be_read_is_told_each_time_and_the_others_are_there():
    plane, files, _ = filed(broken=(12,))
    assert torch.equal(plane.read(slice(0, 10), "k", torch.float32), files["k"].tensor[:, :10])
    for _ in range(2):
        with pytest.raises(SessionCorruptError, match="checksum"):
            plane.read(slice(11, 14), "k", torch.float32)
    arrivals = Arrivals([plane.coming])
    arrivals.start()
    arrivals.join()  # it ends: nobody is told by a thread
    assert plane.coming is not None and plane.coming.left("k")
    assert torch.equal(plane.read(slice(13, PAGES), "k", torch.float32), files["k"].tensor[:, 13:])
    assert plane.coming.left("k") == 3, "itself, and what is read with it"


def test_many_threads_and_the_background_bring_each_page_once():
    plane, files, _ = filed(seconds=0.002)
    failed = []

    def read(start):
        for first in [*range(start, PAGES, 3), *range(0, start, 3)]:
            if not torch.equal(plane.read(slice(first, first + 1), "k", torch.float32), files["k"].tensor[:, [first]]):
                failed.append(first)

    arrivals = Arrivals([plane.coming])
    arrivals.start()
    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 7, 20, 33)]
    for thread in threads:
        thread.start()
    plane.reserve(200)  # its memory moves meanwhile
    for thread in [*threads, arrivals]:
        thread.join()
    assert not failed and plane.coming is None
    assert sorted(files["k"].read_pages) == sorted(files["v"].read_pages) == list(range(PAGES))
    assert torch.equal(plane.tensors["v"][:, :PAGES], files["v"].tensor)


def test_slots_that_were_given_back_are_left_alone():
    plane, files, _ = filed(seconds=0.05)
    reader = threading.Thread(target=plane.need, args=(slice(0, 5),))
    reader.start()
    time.sleep(0.02)  # it is being read
    plane.release([2, 30])
    again = plane.take(2)
    for what in ("k", "v"):
        plane.write(again, what, torch.zeros(HEADS, 2, PAGE, DIM))
    reader.join()
    plane.need(None)
    assert (
        sorted(again) == [2, 30] and not plane.tensors["k"][:, again].any() and not plane.tensors["v"][:, again].any()
    )
    rest = [slot for slot in range(PAGES) if slot not in again]
    for what in ("k", "v"):
        assert torch.equal(plane.tensors[what][:, rest], files[what].tensor[:, rest])
    assert 30 not in files["k"].read_pages


def test_slots_move_and_are_copied_with_what_is_still_to_come():
    plane, files, _ = filed()
    (target,) = plane.take(1)
    plane.copy(7, target)
    assert torch.equal(plane.tensors["k"][:, target], files["k"].tensor[:, 7])
    plane.release(range(10, PAGES))
    moved = plane.compact()
    assert plane.slots == 11 and moved == {target: 10}
    assert torch.equal(plane.tensors["v"][:, :10], files["v"].tensor[:, :10])


def test_the_background_steps_aside_and_ends_with_its_plane(monkeypatch):
    monkeypatch.setattr(coming, "_QUIET", 0.2)
    plane, files, _ = filed()
    arrivals = Arrivals([plane.coming])
    plane.need(slice(0, 1), "v")
    arrivals.start()
    time.sleep(0.05)
    assert files["k"].read_pages == [], "somebody has just waited for a page"
    plane.coming.wanted = {"k"}
    deadline = time.monotonic() + 5
    while plane.coming.left("k") and time.monotonic() < deadline:
        time.sleep(0.005)
    assert sorted(files["k"].read_pages) == list(range(PAGES)), "but what is wanted next comes at once"
    del plane
    arrivals.join()
