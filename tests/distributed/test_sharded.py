"""Attention over 2, 3 and 4 ranks is that of one rank, and what a token sends does not grow with the context."""

import pytest
import torch

from longspan.attention import Hints, make, sharded
from longspan.distributed.nodes import Nodes
from longspan.distributed.shards import ShardRotary, ShardRows, Shards
from longspan.kv.base import TensorKV
from longspan.kv.rotary import Rotary

DIM, TRAINED = 16, 300
SPECS = (
    ("dense", {}),
    ("streaming", {"window": 50, "sinks": 4}),
    ("superlinear", {"window": 80, "spans": 3}),
    ("superlinear", {"window": 80, "spans": 2, "gate": "routed", "sinks": 3, "share": "group"}),
    ("superlinear", {"window": 80, "gate": "routed", "summary": "bounds", "power": 0.55, "span_power": 0.55}),
    ("tree", {"window": 70, "leaves": 4, "beam": 2}),
    ("tree", {"window": 70, "leaves": 3, "beam": 2, "open_by": "mean", "who": "layer", "sinks": 0}),
)
CASES = (
    # tokens, queries, query heads, KV heads, positions trained
    (1, 1, 4, 2, None),
    (70, 70, 4, 4, TRAINED),
    (777, 63, 6, 2, TRAINED),
    (1500, 1, 4, 1, TRAINED),
    (2501, 40, 4, 2, 10**6),
    (20011, 1, 4, 2, TRAINED),
)


def inputs(tokens, queries, heads, kv_heads, trained, routed=False):
    torch.manual_seed(tokens)
    q, routing = torch.randn(2, 1, heads, queries, DIM).unbind(0)
    k, v = torch.randn(2, 1, kv_heads, tokens, DIM).unbind(0)
    rotary = None if trained is None else Rotary(10000 ** -(torch.arange(0, DIM, 2) / DIM), trained)
    return q, routing if routed else None, k, v, rotary


def rows_of(group, unit, k, v, rotary):
    shards = Shards(group.rank, group.size, unit)
    tokens = shards.tokens(torch.arange(shards.count(k.shape[2])))
    own = TensorKV(k[:, :, tokens], v[:, :, tokens], None if rotary is None else ShardRotary(rotary, shards))
    return ShardRows(own, shards, rotary, k.shape[2], Nodes())


def distances(group, name, options, cases):
    """How far this rank's outputs are from one rank's, with outputs wanted everywhere and split."""
    mechanism, found = make(name, **options), []
    for tokens, queries, heads, kv_heads, trained in cases:
        q, routing, k, v, rotary = inputs(tokens, queries, heads, kv_heads, trained, name == "superlinear")
        hints = Hints(routing_query=routing, layer=5)
        wanted = mechanism.attend(q, TensorKV(k, v, rotary), hints=hints)
        rows = rows_of(group, mechanism.shard_unit, k, v, rotary)
        given = {"first": tokens - queries, "scale": DIM**-0.5, "hints": hints}
        found.append(float((sharded.attend(mechanism, q, rows, group, **given) - wanted).abs().max()))
        split = [queries * (r + 1) // group.size - queries * r // group.size for r in range(group.size)]
        own = wanted.split(split, 2)[group.rank]
        part = sharded.attend(mechanism, q, rows, group, split=split, **given)
        assert part.shape == own.shape
        found.append(float((part - own).abs().max()) if own.numel() else 0.0)
    return found


def sent(group, name, options, lengths):
    """Bytes that one decode step sends, at each length."""
    mechanism, found = make(name, **options), []
    for tokens in lengths:
        q, _, k, v, rotary = inputs(tokens, 1, 4, 2, None)
        rows = rows_of(group, mechanism.shard_unit, k, v, rotary)
        for _ in range(2):  # the first call makes known to all what is summarised of the whole context
            before = group.sent.total()
            sharded.attend(mechanism, q, rows, group, first=tokens - 1, scale=1.0, hints=Hints(layer=5))
        found.append(group.sent.total() - before)
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("name", "options"), SPECS)
def test_ranks_attend_as_one_does(ranks, size, name, options):
    cases = CASES if size == 3 else CASES[2:4]
    found = ranks.run(distances, name, options, cases, size=size)
    assert max(map(max, found)) < 2e-6, found


@pytest.mark.parametrize(("name", "options"), SPECS)
def test_what_a_token_sends_does_not_grow(ranks, name, options):
    # Both have full levels of the tree alike: 18 and 34 pages before the window.
    short, long = ranks.run(sent, name, options, (18 * 1024 + 100, 34 * 1024 + 100), size=3)[0]
    assert 0 < short == long < 6000


def ties(group):
    """One text again and again: anchors with the same key score alike, wherever they lie."""
    mechanism = make("superlinear", window=80, spans=2)
    torch.manual_seed(3)
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 7, 64), torch.randn(1, 2, 3003, 64)
    k = k.repeat(1, 1, 429, 1)
    wanted = mechanism.attend(q, TensorKV(k, v))
    rows = rows_of(group, mechanism.shard_unit, k, v, None)
    found = sharded.attend(mechanism, q, rows, group, first=3002, scale=64**-0.5, hints=Hints())
    return float((found - wanted).abs().max())


def test_ties_go_to_the_newer_anchor_on_any_rank(ranks):
    assert max(ranks.run(ties, size=3)) < 2e-6
