"""The proof's short form: a few kills, flips, full disks and refusals, by the code of `benchmarks/durability.py`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import durability

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks children and kills them")


@pytest.fixture
def rig(place: Path, one_thread: None, places: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[durability.Rig]:
    monkeypatch.setattr(durability.committing, "COMPACTED", durability.committing.COMPACTED)
    yield durability.Rig(place)


def test_whatever_was_acknowledged_is_there_after_a_kill(rig: durability.Rig) -> None:
    found = durability.kills(rig, 5, random.Random(1))
    assert found["kills"] == 5 and found["acknowledged"] > 0
    assert (found["lost"], found["logits_differ"], found["orphans"], found["damaged"]) == (0, 0, 0, 0)


def test_a_flipped_bit_a_full_disk_a_clock_and_two_processes(rig: durability.Rig) -> None:
    for what, told in durability.flips(rig, 4, random.Random(2)).items():
        assert told["found"] + told.get("in bytes that say nothing", 0) == told["flipped"], what
    full = durability.full_disk(rig, step=16_384)
    assert full["whole_with_room"] and full["write_points"] == full["commit_before_intact"] > 3
    clocks = durability.clocks(rig)
    assert [told["removed"] for told in clocks.values()] == [[], [], ["cache"]]
    assert durability.two_processes(rig, 0.5) | {"reads": 0} == {"reads": 0, "torn": 0, "problems": 0}


def test_what_does_not_belong_is_refused(rig: durability.Rig) -> None:
    told = durability.refusals(rig)
    assert len(told) == 7 and "NOT REFUSED" not in told.values()
    assert all("\n" not in line for line in told.values())
