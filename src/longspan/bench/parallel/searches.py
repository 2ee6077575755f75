"""Mechanisms that search over ranks: a decode step and a chunk's queries, beside the same mechanism on one rank.

Tokens are dealt out as the engine deals them, and queries go to the keys (`attention/sharded.py`). Before anything is
timed, outputs are compared with those of the same mechanism on one rank that holds all keys, in plain PyTorch; the time
beside is of that rank by the fastest way that it has. It does not know the mechanisms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, parse, sharded
from longspan.bench import timing
from longspan.bench.parallel.inputs import Inputs
from longspan.bench.parallel.turns import slowest, turns
from longspan.distributed.group import Group
from longspan.distributed.layout import interleaved
from longspan.distributed.nodes import Nodes
from longspan.distributed.shards import ShardRows, Shards
from longspan.errors import UsageError
from longspan.kv.base import TensorKV

_CHUNK = {"cuda": 2048, "cpu": 64}
"""Queries of a rank's part of a chunk."""
_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-10}
_FLIPPED = 0.01
"""Share of rows that may lie further off: a search may choose otherwise where two scores differ by a rounding."""


def counts(group: Group, whats: Sequence[str], length: int) -> list[int]:
    """Return how many of the newest queries are timed together: one in decode, a chunk of all ranks in prefill."""
    chunk = min(length // group.size, _CHUNK[group.device.type]) * group.size
    return [count for what, count in (("decode", 1), ("prefill", chunk)) if what in whats and count]


def row(group: Group, inputs: Inputs, spec: str, length: int, queries: int, seconds: float) -> dict[str, Any]:
    """Return the figures of one mechanism; every rank calls it.

    Args:
        group: the ranks.
        inputs: whose queries, keys and values they are.
        spec: the mechanism, such as `superlinear:spans=3`.
        length: tokens of the context, the queries' own included.
        queries: how many of the newest attend; each rank wants the outputs of its own, or all of one.
        seconds: of timing for each figure.

    Raises:
        UsageError: a mechanism that does not run over ranks.
    """
    mechanism, first = parse(spec), length - queries
    if not mechanism.sharded:
        raise UsageError(f"attention {mechanism.name!r} does not run over several ranks")
    shards = Shards(group.rank, group.size, mechanism.shard_unit)
    found: dict[str, Any] = {"what": "decode" if queries == 1 else "chunk", "scheme": spec, "length": length}
    held = interleaved(length, group.size, block=shards.unit).runs[group.rank]
    own = TensorKV(inputs.at("k", held), inputs.at("v", held))
    rows = ShardRows(own, shards, None, length, Nodes())
    each = queries // group.size
    asked = [(first, length)] if queries == 1 else [(first + group.rank * each, first + (group.rank + 1) * each)]
    q, scale, hints = inputs.at("q", asked), inputs.head_dim**-0.5, Hints(layer=2)

    def over() -> Tensor:
        if queries == 1:
            return sharded.attend(mechanism, q, rows, group, first=first, scale=scale, hints=hints)
        every = torch.cat(list(group.gather(q)), 2)
        split = [each] * group.size
        return sharded.attend(mechanism, every, rows, group, first=first, scale=scale, hints=hints, split=split)

    with torch.no_grad():
        over()  # what all ranks must know is told once, and not again
        group.sent.clear()
        out = over()
        sent = sum(group.sent.values())
        times = turns(group, over, seconds)
        whole = TensorKV(inputs.at("k", [(0, length)]), inputs.at("v", [(0, length)]))
        every = inputs.at("q", [(first, length)])
        wanted = Mechanism.attend(mechanism, every, whole, scale=scale, hints=hints)
        error, flipped = _distance(group, out, wanted if queries == 1 else wanted.split(each, 2)[group.rank], inputs)
        if flipped > _FLIPPED:
            told = f"{spec} at {length:,}: {100 * flipped:.2g} % of outputs are not those of one rank: not timed"
            return found | {"skipped": told}
        mechanism.attend(every, whole, scale=scale, hints=hints)
        alone = timing.spread(turns(group, lambda: mechanism.attend(every, whole, scale=scale, hints=hints), seconds))[
            0
        ]
    middle, low, high = timing.spread(times)
    return found | {
        "queries": queries, "seconds": middle, "low": low, "high": high, "turns": len(times),
        "alone_seconds": alone, "speedup": alone / middle, "sent_bytes": int(slowest(group, sent)),
        "error": error, "chosen_otherwise": flipped,
    }  # fmt: skip


def _distance(group: Group, out: Tensor, wanted: Tensor, inputs: Inputs) -> tuple[float, float]:
    """Return the greatest distance of a row over its length among those that agree, and the share that do not."""
    apart = (out.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1)
    agree = apart <= _TOLERANCE[inputs.dtype]
    worst = float(apart[agree].max()) if bool(agree.any()) else 0.0
    return slowest(group, worst), slowest(group, 1.0 - float(agree.double().mean()))
