"""What ranks say to each other, what it takes, and what happens when one of them is gone."""

import os
import time

import pytest
import torch
from ranks import Ranks

from longspan.distributed import group as module
from longspan.distributed.group import Group
from longspan.distributed.merge import merge_into, merged
from longspan.errors import ParallelError, UsageError
from longspan.kernels.partial_attention.reference import merge_partials


def speak(group):
    """Every operation once, and what it sent."""
    own = torch.full((3, 2), float(group.rank))
    incoming = torch.full((3, 2), -1.0)
    empty = torch.empty(0)
    group.exchange([own, empty], [incoming, empty]).wait()
    gathered = group.gather(own.t())
    total = group.reduce(own.clone())
    most = group.reduce(own.clone(), "max")
    told = group.broadcast(own.clone(), source=group.size - 1)
    group.barrier()
    return incoming, gathered, total, most, told, dict(group.sent)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_operations_and_their_bytes(ranks, size):
    for rank, (incoming, gathered, total, most, told, sent) in enumerate(ranks.run(speak, size=size)):
        assert torch.equal(incoming, torch.full((3, 2), float((rank - 1) % size)))
        assert torch.equal(gathered, torch.arange(float(size)).view(-1, 1, 1).expand(size, 2, 3))
        assert torch.equal(total, torch.full((3, 2), float(sum(range(size)))))
        assert torch.equal(most, torch.full((3, 2), size - 1.0)) and torch.equal(told, most)
        if size == 1:
            assert sent == {}
        else:
            assert sent["ring"] == 24 and sent["gather"] == 24 * (size - 1)
            assert sent["reduce"] == 2 * (2 * (size - 1) * 24 // size) + 2 * (size - 1) * 4 // size  # and the barrier's
            assert sent["broadcast"] == (24 if rank == size - 1 else 0)


def merge(group, outs, lses, gathered):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GATHERED", gathered)
        before = group.sent.copy()
        return *group.merge(outs[group.rank], lses[group.rank]), dict(group.sent - before)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("gathered", [0, 1 << 20], ids=["tree", "gathered"])
def test_merge_is_the_softmax_over_all_ranks(ranks, size, gathered):
    torch.manual_seed(size)
    outs, lses = torch.randn(size, 2, 5, 8), 20 * torch.randn(size, 2, 5)
    lses[0, 0, 1], lses[:, 0, 2] = float("-inf"), float("-inf")
    outs[0, 0, 1] = float("nan")  # of a rank without keys
    wanted, wanted_lse = merge_partials(outs.double(), lses.double())
    found = ranks.run(merge, outs, lses, gathered, size=size)
    if size == 1:
        assert torch.equal(found[0][0].nan_to_num(7.0), outs[0].nan_to_num(7.0)) and torch.equal(found[0][1], lses[0])
        return
    sent, packed = [sum(counted.values()) for _, _, counted in found], 4 * 2 * 5 * 9
    wanted_sent = {2: [1, 1], 3: [2, 1, 1], 4: [2, 2, 2, 2]}[size] if gathered == 0 else [size - 1] * size
    assert [count // packed for count in sent] == wanted_sent
    for out, lse, _ in found:
        torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)
        assert torch.equal(out, found[0][0]), "ranks that go on with other bits go on with other tokens"


def test_a_merge_in_place_takes_half_types():
    torch.manual_seed(0)
    out, lse, part, part_lse = torch.randn(4, 6), torch.randn(4), torch.randn(4, 6).bfloat16(), torch.randn(4)
    lse[0] = part_lse[1] = lse[2] = part_lse[2] = float("-inf")
    out[0] = part[1] = float("nan")
    wanted = merged(part, part_lse, out, lse)
    assert torch.equal(wanted[0][0], part[0].float()) and torch.equal(wanted[0][1], out[1])
    assert torch.equal(wanted[0][2], torch.zeros(6)) and wanted[1][2] == float("-inf")
    merge_into(out, lse, part, part_lse)
    assert torch.equal(out, wanted[0]) and torch.equal(lse, wanted[1])


def fail(group, how):
    """Rank 1 dies or hangs; the others notice within the timeout."""
    if group.rank == 1 and how == "dies":
        os._exit(1)
    if group.rank == 1:
        time.sleep(6)
    started = time.monotonic()
    try:
        group.gather(torch.ones(1))
    except ParallelError as error:
        return str(error), time.monotonic() - started
    return "nothing was noticed", 0.0


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_gone_is_told_in_one_line(tmp_path, how):
    started = Ranks(tmp_path, 2, timeout=2.0)
    try:
        for pipe in started.pipes:
            pipe.send((fail, (how,), 2))
        (told, seconds), wrong = started.answers([0])[0]
    finally:
        started.close()
    assert not wrong and seconds < 5 and "\n" not in told
    assert told.startswith("rank 0 of 2: gathering failed, since a rank stopped or did not answer in 2 s: start all")


def test_ranks_are_started_together(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node"):
        Group.start("cpu")
