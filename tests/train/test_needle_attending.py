"""How the needle model attends while it learns: what is seen, which cells anchors stand for, who is taught."""

import pytest
import torch
from torch.nn import functional as F

from longspan.attention import parse
from longspan.attention.superlinear import Superlinear
from longspan.hf import routing
from longspan.train.needle import attending, batches, tasks
from longspan.train.needle.attending import SINKS, Attending
from longspan.train.needle.recipe import Phase

HAY = b"The harbour board met in May, and nobody had asked for a lantern. " * 40
T, SPLIT = 96, 64


def tensors(seed=0, length=T):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, 8, generator=source) for heads in (4, 2, 2)]


def truth(q, k, v, seen):
    k, v = (x.repeat_interleave(2, 1).double() for x in (k, v))
    scores = (q.double() @ k.mT * 0.3).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, -1) @ v).float()


@pytest.mark.parametrize("segment", [16, 32, SPLIT])
def test_text_sees_its_segment_and_questions_see_all(segment):
    q, k, v = tensors()
    at = torch.arange(T)
    seen = (at <= at.unsqueeze(1)) & ((at // segment == at.unsqueeze(1) // segment) | (at.unsqueeze(1) >= SPLIT))
    found = Attending(SPLIT, segment, 0.3)(0, q, k, v)
    torch.testing.assert_close(found, truth(q, k, v, seen), atol=1e-5, rtol=1e-4)


def taught(rank=3):
    source = torch.Generator().manual_seed(1)
    (made,) = routing.begin(1, 32, rank, source)
    return routing.Routing(made.down, (0.1 * torch.randn(32, rank, generator=source)).requires_grad_())


def test_questions_that_read_what_they_find_read_as_superlinear_does():
    q, k, v = tensors(length=400)
    route = taught()
    mechanism = parse(f"superlinear:window=24,sinks={SINKS}")
    assert isinstance(mechanism, Superlinear) and mechanism.whole_window == 24
    at, rows = torch.arange(400), torch.arange(380, 400)
    seen = at <= rows.unsqueeze(1)
    one = Attending(380, 380, 0.3, [route], near=24)
    shown = seen & one._shown(route, q[:, :, 380:], k, rows, at)
    for head in range(4):
        for i in (0, 7, 19):
            t = int(rows[i])
            anchors = [a for a in mechanism.anchors(t) if a >= SINKS]
            scores = route(q)[0, head, t] @ k[0, head // 2, anchors].mT
            wanted = set(range(SINKS)) | set(range(t - 23, t + 1))
            for best in scores.topk(3).indices.tolist():
                lo, hi = mechanism.span(t, anchors[best])
                wanted |= set(range(lo, hi + 1))
            assert set(shown[0, head, i].nonzero().flatten().tolist()) == wanted
    found = Attending(380, 380, 0.3, [route], near=24, sparse=True)(0, q, k, v)
    torch.testing.assert_close(found[:, :, 380:], truth(q[:, :, 380:], k, v, shown), atol=1e-5, rtol=1e-4)


def test_cells_share_what_is_far_among_them():
    source = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(1, 1, 2, 50, generator=source), -1)
    anchors, valid = Attending(0, 0, 1.0, near=4)._anchors(torch.tensor([[30, 49]]), 50)
    cells = attending._cells(F.pad(weights.cumsum(-1), (1, 0)), anchors.unsqueeze(1), valid.unsqueeze(1))
    for row, t in enumerate((30, 49)):
        known = anchors[0, row][valid[0, row]].tolist()
        assert known == [t - i * i + 1 for i in range(3, 8) if t - i * i + 1 >= SINKS]
        for i, (newer, older) in enumerate(zip(known, [*known[1:], SINKS - 1], strict=True)):
            wanted = weights[0, 0, row, older + 1 : newer + 1].sum()
            assert float(cells[0, 0, row, i]) == pytest.approx(float(wanted), abs=1e-6)
    assert float(cells[~valid.unsqueeze(1)].sum()) == 0.0


def test_searching_teaches_keys_and_routing_queries():
    q, k, v = (x.requires_grad_() for x in tensors(length=200))
    route = taught()
    one = Attending(150, 150, 0.3, [route], torch.tensor([[160, 190], [170, 199]]), near=9)
    one(0, q, k, v)
    one.losses[0].backward()
    assert route.up.grad.abs().max() > 0 and k.grad.abs().max() > 0 and 0 <= float(one.found[0]) <= 1
    assert one.losses[0] > 0


def test_a_search_for_nothing_teaches_nothing():
    q, k, v = (x.requires_grad_() for x in tensors(length=32))
    one = Attending(16, 16, 0.3, [taught()], torch.full((2, 3), 5), near=9)
    one(0, q, k, v)
    one.losses[0].backward()
    assert one.losses[0].item() == 0.0 and torch.isfinite(k.grad).all()


def test_workers_make_the_batches_that_one_process_makes():
    phases = [Phase(0.5, 64, 32, rows=4), Phase(1.0, 128, 64, rows=4)]
    alone, ahead = batches.Batches(HAY, 7, 256), batches.Batches(HAY, 7, 256, workers=1)
    try:
        for step, phase in enumerate([phases[0], phases[0], phases[1], phases[1]]):
            first, second = alone.get(step, phase), ahead.get(step, phase)
            assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("ids", "marks", "rows"))
            assert first.ids.shape == (256 // phase.length, phase.length)
    finally:
        ahead.close()


def test_rows_predict_answers():
    made = [tasks.make(seed, 400, HAY, tasks.Mix(asked=200)) for seed in range(3)]
    _, marks = batches.batched(made, 400)
    rows = batches.answering(marks, 8)
    for each, found in zip(marks, rows, strict=True):
        assert (each[found + 1] == batches.ANSWER).all() and (found[1:] >= found[:-1]).all()
    nothing = batches.answering(marks * 0, 2)
    assert (nothing == 399).all()
