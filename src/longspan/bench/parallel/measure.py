"""Times schemes on all ranks at once, beside one rank alone in the same run; outputs are compared with the truth first.

A call's time is the slowest rank's, between barriers. One rank alone attends by the same kernels to the same keys: all
queries, or as many of the last as take no more than some seconds. Rates count the pairs that a scheme has to compute,
so that `efficiency` (a rank's rate over one rank's alone) says what sending costs, and `speedup` (one rank's time for
the whole over the scheme's) what is gained. It does not know command lines.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.bench import timing
from longspan.bench.parallel import searches, truth
from longspan.bench.parallel.inputs import Inputs
from longspan.bench.parallel.schemes import Scheme, decode_layout, scheme
from longspan.bench.parallel.turns import slowest, synchronize, turns
from longspan.distributed.context_parallel import decode_attention
from longspan.distributed.group import Group
from longspan.distributed.layout import contiguous
from longspan.distributed.ring import ring_attention
from longspan.distributed.star import Star
from longspan.errors import LongspanError, ParallelError

_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-10}
"""Greatest distance of a row from the truth, over its length; as in `longspan bench attention`, or closer."""
_ALONE_PAIRS = {"cuda": 1 << 37, "cpu": 1 << 24}
"""Pairs of a query and a key, a head, up to which one rank alone reads a context whole: some 5 s of an H100 for 32
heads. Of longer ones it reads the last queries, half as many pairs."""
_LONG = 12.0
"""Seconds from which on a call is timed while it is checked, and not once more: first calls plan for some 0.1 s."""
_STEPS = 8
"""Decode steps that are timed together."""


class WrongOutputError(LongspanError):
    """A scheme gives another result than the mathematics: there is no figure of it."""


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    lengths: tuple[int, ...]
    schemes: tuple[str, ...]
    whats: tuple[str, ...]
    inputs: Inputs
    anchor: int | None
    block: int | None
    seconds: float
    mechanisms: tuple[str, ...] = ()
    """Those that search over ranks, as `--attention` names them."""

    def flops(self, pairs: float) -> float:
        """Return the FLOPs of so many pairs a head."""
        return 4.0 * self.inputs.heads * self.inputs.head_dim * pairs


def measured(group: Group, asked: Asked, say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure everything; every rank calls it, and each row is told and kept as it comes.

    Raises:
        WrongOutputError: an output of ours is wrong.
        UsageError: a scheme that does not exist, or can't be laid out.
        ParallelError: a rank stopped.
    """
    for length in asked.lengths:
        if "prefill" in asked.whats and asked.schemes:
            star = Star(length, group.size, asked.anchor, asked.block)
            ways = [scheme(name, group, length, star) for name in asked.schemes]
            alone = _alone(group, asked, length)
            say(f"one rank alone at {length:,}: {alone:.3g} TFLOP/s")
            for way in ways:
                _told(prefill(group, asked, way, length, alone), say, keep)
        if "decode" in asked.whats and asked.schemes:
            _told(decode(group, asked, length), say, keep)
        for spec in asked.mechanisms:
            for queries in searches.counts(group, asked.whats, length):
                _told(searches.row(group, asked.inputs, spec, length, queries, asked.seconds), say, keep)


def _told(row: dict[str, Any], say: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> None:
    keep({key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()})
    figures = row.get("skipped") or f"{1000 * row['seconds']:.4g} ms, {row['speedup']:.3g} times one rank's speed"
    say(f"{row['what']} at {row['length']:,}: {row['scheme']} {figures}")


def prefill(group: Group, asked: Asked, way: Scheme, length: int, alone: float) -> dict[str, Any]:
    """Return the row of one scheme reading a whole context; `alone`: TFLOP/s of one rank."""
    row: dict[str, Any] = {"what": "prefill", "scheme": way.name, "length": length}
    if way.missing:
        return row | {"skipped": way.missing}
    inputs = asked.inputs
    q, k, v = (inputs.at(kind, way.reads) for kind in "qkv")
    _reset(group)
    with way.around(), torch.no_grad():
        try:
            out, sent, first = _all_or_none(group, lambda: way.attend(q, k, v))
        except _NotHereError as reason:
            return row | {"skipped": str(reason)}
        peak = _peak(group)
        shown = q.shape[2] - sum(stop - start for start, stop in way.held)
        rows = truth.rows_of(inputs.heads, length, group.size, inputs.seed)
        wanted = truth.attended(group, inputs, rows, way.held, k[:, :, shown:], v[:, :, shown:], way.seen)
        error, found = truth.error(group, out[:, :, shown:], rows, way.held, wanted)
        del out
        if not error <= _TOLERANCE[inputs.dtype] or found != len(rows):
            told = f"{way.name} at {length:,}: a sampled output differs by {error:.2g} of its length: not timed"
            if way.name.startswith("torch"):
                return row | {"skipped": told}
            raise WrongOutputError(told)
        times = [first] if first > _LONG else turns(group, lambda: way.attend(q, k, v), asked.seconds)
    middle, low, high = timing.spread(times)
    rate = asked.flops(way.pairs) / middle / 1e12
    return row | {
        "seconds": middle, "low": low, "high": high, "turns": len(times),
        "tflops_per_rank": rate, "efficiency": rate / alone,
        "speedup": asked.flops(length * (length + 1) / 2) / 1e12 / alone / middle, "alone_tflops": alone,
        "sent_bytes": int(slowest(group, sent)), "peak_bytes": peak, "error": error, "rows_checked": found,
    }  # fmt: skip


def decode(group: Group, asked: Asked, length: int) -> dict[str, Any]:
    """Return the row of decode steps over all ranks' keys, beside one rank that holds them all."""
    inputs, layout = asked.inputs, decode_layout(group, length)
    scale = inputs.head_dim**-0.5
    row: dict[str, Any] = {"what": "decode", "scheme": "merge", "length": length}
    own = layout.runs[group.rank]
    k, v = inputs.at("k", own), inputs.at("v", own)
    queries = [inputs.at("q", [(length - 1 - i, length - i)])[:, :, 0] for i in range(min(_STEPS, length))]
    counts = torch.full((1,), k.shape[2], device=group.device)
    group.sent.clear()
    with torch.no_grad():
        out = decode_attention(group, queries[0], k, v, counts, scale=scale)
        sent = sum(group.sent.values())
        rows = [truth.Row(head, length - 1) for head in range(inputs.heads)]
        wanted = truth.attended(group, inputs, rows, own, k, v, truth.causal)
        error, _ = truth.error(group, out.unsqueeze(2), rows, [(length - 1, length)], wanted)
        if not error <= _TOLERANCE[inputs.dtype]:
            raise WrongOutputError(f"decode at {length:,}: an output differs by {error:.2g} of its length: not timed")
        step, graph = _steps(group, [partial(decode_attention, group, q, k, v, counts, scale=scale) for q in queries])
        times = [each / len(queries) for each in turns(group, step, asked.seconds)]
    del k, v, out, step
    alone = _decode_alone(group, asked, queries, length)
    middle, low, high = timing.spread(times)
    numbers = 2 * inputs.kv_heads * inputs.head_dim * inputs.dtype.itemsize
    return row | {
        "seconds": middle, "low": low, "high": high, "turns": len(times), "graph": graph,
        "alone_seconds": alone, "speedup": alone / middle, "efficiency": alone / middle / group.size,
        "read_bytes_per_s_per_rank": numbers * max(layout.counts) / middle,
        "sent_bytes": int(slowest(group, sent)), "error": error, "rows_checked": len(rows),
    }  # fmt: skip


def _decode_alone(group: Group, asked: Asked, queries: list[Tensor], length: int) -> float:
    """Return the seconds of a step on rank 0 with all keys, which the others wait for."""
    seconds = 0.0
    if group.rank == 0:
        one = Group.alone(group.device)
        k, v = (asked.inputs.at(kind, [(0, length)]) for kind in "kv")
        counts = torch.full((1,), length, device=group.device)
        scale = asked.inputs.head_dim**-0.5
        with torch.no_grad():
            step, _ = _steps(one, [partial(decode_attention, one, q, k, v, counts, scale=scale) for q in queries])
            seconds = timing.spread(turns(one, step, asked.seconds))[0] / len(queries)
    return slowest(group, seconds)


def _alone(group: Group, asked: Asked, length: int) -> float:
    """Return the TFLOP/s of rank 0 alone, by the kernels that the ring calls, which the others wait for."""
    rate = 0.0
    if group.rank == 0:
        one, inputs = Group.alone(group.device), asked.inputs
        most = _ALONE_PAIRS[group.device.type]
        count = length if length * length / 2 <= most else max(1, most // (2 * length))
        keys, queries = contiguous(length, 1), contiguous(count, 1, length - count)
        q = inputs.at("q", [(length - count, length)])
        k, v = (inputs.at(kind, [(0, length)]) for kind in "kv")
        with torch.no_grad():

            def attend() -> Tensor:
                return ring_attention(one, q, k, v, queries, keys)

            attend()
            pairs = count * (length - count) + count * (count + 1) / 2
            rate = asked.flops(pairs) / timing.spread(turns(one, attend, asked.seconds))[0] / 1e12
    return slowest(group, rate)


def _steps(group: Group, calls: list[Callable[[], Tensor]]) -> tuple[Callable[[], object], bool]:
    """Return what runs the steps once, and whether it is a CUDA graph."""
    if group.device.type == "cuda":
        with contextlib.suppress(RuntimeError, ParallelError):
            return timing.captured(calls, mode="thread_local")[0], True
    return lambda: [call() for call in calls], False


class _NotHereError(Exception):
    """A scheme that fails on some rank: all go on without it."""


def _all_or_none(group: Group, call: Callable[[], Tensor]) -> tuple[Tensor, int, float]:
    """Return what a call gives, if it gives it on every rank, the bytes that this rank sent, and the seconds."""
    told, out = "", None
    group.barrier()
    group.sent.clear()
    began = time.perf_counter()
    try:
        out = call()
        synchronize(group)
    except LongspanError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        told = str(error).strip().splitlines()[0]
        _clean(group)
    seconds, sent = time.perf_counter() - began, sum(group.sent.values())
    if slowest(group, float(out is None)):
        raise _NotHereError(f"failed: {told or 'on another rank'}")
    assert out is not None
    return out, sent, slowest(group, seconds)


def _peak(group: Group) -> int | None:
    """Return the bytes of GPU memory that the busiest rank had in use at most; None on a CPU."""
    return int(slowest(group, torch.cuda.max_memory_allocated())) if group.device.type == "cuda" else None


def _reset(group: Group) -> None:
    _clean(group)
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _clean(group: Group) -> None:
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
