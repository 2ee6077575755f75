"""Star attention by its equations, written plainly: phase 1 by masks, phase 2 by sums of exponentials."""

import pytest
import torch
from plain_ranks import inputs

from longspan.distributed.context_parallel import spread_attention
from longspan.distributed.layout import held_by
from longspan.distributed.star import Star, star_attention
from longspan.errors import UsageError

CASES = [
    # length, anchor, block
    (48, None, None), (50, None, None), (50, 5, None), (50, 0, None), (50, None, 8), (50, 3, 8), (7, 2, 2),
    (1, None, None), (600, 40, 150), (3, 1, 1),
]  # fmt: skip


def phase_one(q, k, v, anchor, block):
    """Each query sees the anchor and, of its own block, what is before it."""
    at = torch.arange(q.shape[2])
    causal = at <= at.unsqueeze(1)
    seen = causal & ((at < anchor) | (at // block == at.unsqueeze(1) // block))
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ v


def phase_two(q, k, v, layout):
    """`A = sum_h (s_h / sum s) A_h`; a question's later keys are hidden from its earlier queries."""
    group, length = q.shape[1] // k.shape[1], k.shape[2]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    exponentials = torch.exp(q.double() @ k.mT / q.shape[-1] ** 0.5)
    exponentials = exponentials.tril(length - q.shape[2])
    sums, outs = [], []
    for rank in range(layout.ranks):
        own = layout.positions(rank)
        if len(own):
            s = exponentials[..., own].sum(-1, keepdim=True)
            sums.append(s)
            outs.append(torch.where(s > 0, exponentials[..., own] @ v[:, :, own] / s, 0.0))
    total = sum(sums)
    return sum(s / total * out for s, out in zip(sums, outs, strict=True))


def read_and_ask(group, cases, asked):
    found = []
    for length, anchor, block in cases:
        star = Star(length, group.size, anchor, block)
        q, k, v = inputs(length + asked)
        at = star.positions(group.rank)
        before = sum(group.sent.values())
        out = star_attention(star, group.rank, q[:, :, at], k[:, :, at], v[:, :, at])
        assert sum(group.sent.values()) == before, "phase 1 sends nothing"
        prefix = star.prefix(group.rank)
        layout = star.layout + held_by(0, asked, group.size, length)
        kept = [x[:, :, at[prefix:]] for x in (k, v)]
        if group.rank == 0:
            kept = [torch.cat([old, x[:, :, length:]], 2) for old, x in zip(kept, (k, v), strict=True)]
        answer = spread_attention(group, q[:, :, length:], *kept, length, layout)
        found.append((out[:, :, :prefix], out[:, :, prefix:], answer))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_both_phases_are_the_papers_equations(ranks, size):
    asked = 5
    found = ranks.run(read_and_ask, CASES, asked, size=size)
    for number, (length, anchor_asked, block_asked) in enumerate(CASES):
        star = Star(length, size, anchor_asked, block_asked)
        block = min(length, block_asked or -(-length // size))
        anchor = block if anchor_asked is None else anchor_asked
        q, k, v = inputs(length + asked)
        wanted = phase_one(q[:, :, :length], k[:, :, :length], v[:, :, :length], anchor, block)
        out = star.layout.whole([each[number][1] for each in found])
        assert (out.double() - wanted).abs().max() < 3e-6, (length, anchor, block)
        for rank, each in enumerate(found):
            prefix = each[number][0]
            assert prefix.shape[2] == star.prefix(rank)
            assert prefix.shape[2] == 0 or (prefix - wanted[:, :, : prefix.shape[2]]).abs().max() < 3e-6
            asked_of = phase_two(q[:, :, length:], k, v, star.layout + held_by(0, asked, size, length))
            assert (each[number][2].double() - asked_of).abs().max() < 3e-6


def test_positions_are_those_of_the_text():
    star = Star(100, 4, anchor=10)
    assert star.positions(0).tolist() == list(range(25))
    assert star.positions(2).tolist() == [*range(10), *range(50, 75)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(anchor=30), "anchor of 30 tokens is longer than its block of 25"),
        (dict(block=0), "block=0 is too small"),
        (dict(anchor=-1), "anchor=-1 is too small"),
    ],
)
def test_nonsense_is_refused(options, told):
    with pytest.raises(UsageError, match=told):
        Star(100, 4, **options)


def test_other_tokens_are_refused():
    q, k, v = inputs(30)
    with pytest.raises(UsageError, match="rank 1 reads 35 tokens"):
        star_attention(Star(100, 4, anchor=10), 1, q, k, v)
