"""The least that a mechanism has to read and to multiply: what no kernel can be faster than.

Bytes: every key and value that these very inputs choose, once a KV head, however many query heads read it (`bytes`);
and as if no two heads or spans shared one (`bytes_apart`), which is what a kernel without luck in its cache reads.
FLOPs: two a multiplied pair of numbers, for search, scores and values; a mean over the queries, with no span cut short
by another. Softmax, sorting and merging are left out: the floor is lower than any real one.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

import torch

from longspan.attention import Mechanism
from longspan.attention.superlinear import Superlinear
from longspan.bench.attention import truth
from longspan.bench.attention.inputs import Inputs
from longspan.bench.timing import Peaks


@dataclass(frozen=True)
class Floor:
    """What one call has to do at least."""

    bytes: int
    bytes_apart: int
    flops: float

    def seconds(self, peaks: Peaks) -> float:
        """Return the time that the device's peaks leave for it."""
        return max(self.bytes / peaks.copy_bytes_per_s, self.flops / peaks.matmul_flops)


def of(mechanism: Mechanism, inputs: Inputs) -> Floor:
    """Return the floor of one forward call, decode (one query) or prefill (several)."""
    if mechanism.name == "dense":
        return _dense(inputs)
    assert isinstance(mechanism, Superlinear)
    return _superlinear(mechanism, inputs)


def _ends(inputs: Inputs) -> int:
    """Bytes of queries and outputs."""
    return 2 * inputs.q.numel() * inputs.q.element_size()


def _token(inputs: Inputs) -> int:
    """Bytes of one token's key and value in one KV head."""
    return 2 * inputs.k.shape[-1] * inputs.k.element_size()


def _dense(inputs: Inputs) -> Floor:
    _, heads, queries, dim = inputs.q.shape
    pairs = queries * inputs.first + queries * (queries + 1) / 2
    read = inputs.k.shape[1] * inputs.k.shape[2] * _token(inputs) + _ends(inputs)
    return Floor(read, read, 4.0 * dim * heads * pairs)


def _superlinear(mechanism: Superlinear, inputs: Inputs) -> Floor:
    _, heads, queries, dim = inputs.q.shape
    _, kv_heads, length, _ = inputs.k.shape
    table = truth.steps(mechanism.power, length + mechanism.window + 1)
    first = bisect.bisect_left(table, mechanism.window + 1)
    window = table[first] - 1
    searched = attended = 0
    for t in range(inputs.first, length):
        anchors = bisect.bisect_right(table, t + 1, lo=first) - first
        reach = float(t + 1) ** mechanism.span_power
        span = math.ceil(mechanism.backward * reach) + math.ceil(mechanism.forward * reach) + 1
        far = max(0, t + 1 - window)
        searched += anchors
        attended += min(window, t + 1) + min(far, mechanism.sinks + min(mechanism.spans, anchors) * span)
    flops = heads * dim * (2.0 * searched + 4.0 * attended)
    if queries == 1:
        return _decode(mechanism, inputs, flops)
    # Which keys a whole chunk chooses is not asked: surely those of its windows, at most all.
    windows, token = min(length, queries + window), kv_heads * _token(inputs)
    return Floor(windows * token + _ends(inputs), length * token + _ends(inputs), flops)


def _decode(mechanism: Superlinear, inputs: Inputs, flops: float) -> Floor:
    heads, (_, kv_heads, length, _) = inputs.q.shape[1], inputs.k.shape
    token, group = _token(inputs), heads // kv_heads
    together = apart = searched = 0
    for head in range(kv_heads):
        choices = [truth.chosen(mechanism, inputs, truth.Row(head * group + i, 0)) for i in range(group)]
        reads = torch.zeros(length, dtype=torch.bool, device=inputs.k.device)
        reads[choices[0].near] = True
        apart += len(choices[0].near)
        for lo, hi in (span for choice in choices for span in choice.spans):
            reads[lo : hi + 1] = True
            apart += hi + 1 - lo
        together += int(reads.sum())
        searched += choices[0].candidates * token // 2  # of an anchor only the key is read
    return Floor(together * token + searched + _ends(inputs), apart * token + searched + _ends(inputs), flops)
