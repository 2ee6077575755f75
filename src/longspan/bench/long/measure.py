"""Times one context of a model: reading it, answering from it, and what memory that takes.

A context that can be read in the time there is, is read whole. Of a longer one, full chunks are timed at several
lengths, each over keys and values that really lie in its pages: random ones with the mean and spread that each layer's
own have, channel by channel; the time of the whole is the integral over its chunks, and the result says so. Where a
chunk takes many seconds, fewer tokens are timed, and the chunk takes as many times as long as it has more.
Whoever calls has set memory aside for the context, its answers and whatever else is read (`KVContext.reserve`).
It does not know whether logits are right (`checks`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longspan.bench.long.checks import random_tokens
from longspan.bench.timing import spread
from longspan.engine.kv_context import KVContext

STEPS, BATCHES = 64, 8
"""Decode steps that are timed together, and how often, unless that takes long."""
_ENOUGH, _LEAST = 10.0, 3
"""Seconds after which no further batch of steps is timed, once there are so many."""
_SLAB = 1 << 16
"""Tokens that are filled in at once."""
_TWICE = 2
"""Times that a chunk is timed at each length, unless it takes a second and more."""
_LONG, _FEWEST = 3.0, 2048
"""Seconds of a chunk beyond which half as many tokens are timed at the next length, and how many are at least."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Read:
    """What reading a context took."""

    seconds: float
    """To the first token of an answer."""
    whole: bool
    """Whether all of it was read; else the seconds are an integral."""
    chunk: int
    chunks: list[tuple[int, float]]
    """Tokens at a chunk's end, and the seconds that it took."""
    fewest: int
    """Tokens that were timed together at least, for what a whole chunk takes."""


def clear(device: torch.device) -> None:
    """Begin a new account of the device's memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def read_whole(context: KVContext, length: int, seed: int) -> Read:
    """Read a context of random tokens, chunk by chunk, and find the first token of an answer.

    What is compiled or planned on first use is no part of the time: chunks of the same sizes are read before, and taken
    back. (cuDNN plans each length of keys anew, in about 50 ms: that stays in dense attention's time.)
    """
    device, tokens = context.model.device, random_tokens(context.model, length, seed)
    chunk = context.chunk
    sizes = [min(chunk, length - start) for start in range(0, length, chunk)]
    last = sizes[-1]
    _warm_up(context, tokens, [*sizes[:2], *sizes[2:][-1:]])
    chunks: list[tuple[int, float]] = []
    _wait(device)
    started = before = time.perf_counter()

    def tick(_: int) -> None:
        nonlocal before
        _wait(device)
        now = time.perf_counter()
        chunks.append((context.length, now - before))
        before = now

    context.extend(tokens[: length - last], tick)
    int(context.rehearse(tokens[length - last :]).argmax())
    tick(last)
    return Read(before - started, True, chunk, chunks, min(chunk, length))


def _warm_up(context: KVContext, tokens: Sequence[int], sizes: Sequence[int]) -> None:
    """Read chunks of these sizes, one after another, and a few single tokens, and take all of it back."""
    for size in sizes:
        context.rehearse(tokens[:size])
    _advance(context, 1, 2)
    context.truncate(0)


def read_parts(context: KVContext, length: int, at: Sequence[int], seed: int, say: Say) -> Read:
    """Time full chunks that end at some lengths, over pages that are filled up to them.

    Args:
        context: empty; it holds `length` tokens afterwards.
        length: tokens of the whole context.
        at: lengths, ascending, of which the last is `length`.
        seed: which tokens.
        say: told each chunk's time.
    """
    chunk = size = context.chunk
    tokens = random_tokens(context.model, chunk, seed)
    chunks: list[tuple[int, float]] = []
    source, seconds = None, 0.0
    for end in (chunk, *at):
        if source is None:
            seconds = _again(context, tokens)
            context.extend(tokens)
            source = _Source(context)
        else:
            if size > _FEWEST and seconds > _LONG:
                size //= 2
            source.fill(end - size - context.length)
            seconds = _again(context, tokens[:size])
        chunks.append((end, seconds * chunk / size))
        say(f"{end:,}: {size:,} tokens in {seconds:.3f} s")
    assert source is not None, "a first chunk is always read"
    source.fill(length - context.length)
    ends = np.arange(chunk, length + chunk, chunk).clip(max=length)
    sizes = np.diff(ends, prepend=0)
    each = np.interp(ends, [end for end, _ in chunks], [seconds for _, seconds in chunks])
    return Read(float((each * sizes / chunk).sum()), False, chunk, chunks, size)


def decode(context: KVContext) -> tuple[float, float, float]:
    """Return tokens/s of decode: median and quartiles over batches of steps."""
    device = context.model.device
    token = _advance(context, 1, STEPS)
    rates: list[float] = []
    _wait(device)
    until = time.perf_counter() + _ENOUGH
    while len(rates) < _LEAST or (len(rates) < BATCHES and time.perf_counter() < until):
        started = time.perf_counter()
        token = _advance(context, token, STEPS)
        rates.append(STEPS / (time.perf_counter() - started))
    return spread(rates)


def memory(context: KVContext) -> dict[str, int] | None:
    """Return bytes by kind that were held at most since `clear`; None: the device keeps no account."""
    device = context.model.device
    if device.type != "cuda":
        return None
    weights = sum(parameter.nbytes for parameter in context.model.model.parameters())
    kv = sum(layer.pool.nbytes for layer in context.layers)
    kv += sum(layer.mirror.held.nbytes for layer in context.layers if layer.mirrored and layer.mirror.length)
    state = context.recurrence.nbytes
    peak = torch.cuda.max_memory_allocated(device)
    return {
        "weights": weights,
        "kv": kv,
        "state": state,
        "workspace": max(0, peak - weights - kv - state),
        "peak": peak,
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def top_kernels(context: KVContext, tokens: int, count: int = 12) -> dict[str, list[dict[str, Any]]]:
    """Return which kernels take the time of a chunk and of a decode step, by PyTorch's profiler (on a GPU)."""
    from torch.profiler import ProfilerActivity, profile

    out = {}
    text = random_tokens(context.model, tokens, 1)
    before = context.length
    for what, call, per in (
        ("prefill", lambda: context.rehearse(text), 1),
        ("decode", lambda: _advance(context, 1, STEPS), STEPS),
    ):
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
            _wait(context.model.device)
        rows = [row for row in found.key_averages() if row.device_type.name == "CUDA"]
        rows.sort(key=lambda row: -row.self_device_time_total)
        out[what] = [
            {
                "kernel": row.key[:80],
                "us": round(row.self_device_time_total / per, 1),
                "calls": round(row.count / per, 1),
            }
            for row in rows[:count]
        ]
        whole = sum(row.self_device_time_total for row in rows) / per
        out[what].append({"kernel": "all", "us": round(whole, 1), "calls": round(sum(r.count for r in rows) / per, 1)})
        context.truncate(before)
    return out


def _again(context: KVContext, tokens: list[int]) -> float:
    """Return the seconds of a chunk that is read and taken back; what is made on first use is no part of them."""
    device, before = context.model.device, context.length
    found: list[float] = []
    while len(found) < 2 or (len(found) <= _TWICE and found[-1] < 1.0):  # the first compiles, and plans
        _wait(device)
        started = time.perf_counter()
        context.rehearse(tokens)
        _wait(device)
        found.append(time.perf_counter() - started)
        context.truncate(before)
    return min(found[1:])


def _advance(context: KVContext, token: int, steps: int) -> int:
    """Read a token and the next ones, as fast as this context can; returns the one that follows."""
    if context.runs:
        return context.run(token, steps)[-1]
    for _ in range(steps):
        token = int(context.step([token]).argmax())
    return token


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Source:
    """Random keys and values with the mean and spread that a context's own have, a channel of a head of a layer."""

    def __init__(self, context: KVContext) -> None:
        """Look at what a context holds."""
        self.context, self.state = context, context.recurrence.state()
        self.moments = []
        for kv in context.layers:
            both = kv.keys(0, context.length)[0].float(), kv.values(0, context.length)[0].float()
            self.moments.append([(rows.mean(1), rows.std(1)) for rows in both])

    def fill(self, count: int) -> None:
        """Add so many tokens to every layer's pages; the recurrent state stays what it was."""
        context, done = self.context, 0
        while done < count:
            size = min(_SLAB, count - done)
            for kv, moments in zip(context.layers, self.moments, strict=True):
                k, v = (_drawn(mean, wide, size, kv.pool.dtype) for mean, wide in moments)
                kv.append(k, v)
                kv.commit()
                if kv.mirrored:
                    kv.keys_at_own_positions(0, kv.length)
            done += size
        context.hold([0] * max(0, count), self.state)


def _drawn(mean: Tensor, wide: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return random rows `[1, Hkv, count, D]` of a mean and a spread `[Hkv, D]`."""
    rows = torch.randn(mean.shape[0], count, mean.shape[1], device=mean.device, dtype=dtype)
    return rows.mul_(wide.unsqueeze(1).to(dtype)).add_(mean.unsqueeze(1).to(dtype)).unsqueeze(0)
