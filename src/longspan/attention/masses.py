"""How much of the attention of some queries falls on each token of the context, whichever mechanism attends.

Attention is linear in the values, `out_t = sum_j w_tj v_j`, so that the weights are its derivatives by the values. They
are taken from the mechanism itself: it attends, once more, to the same keys with a single number a token as value, and
the gradient of a head's output by these numbers is that head's weights, summed over the queries. So a key that was not
read has mass 0, whatever it holds; weights of spans that a gate mixes are counted as they were mixed; and a mean that
stands for a block (tree) gives its mass to the block's tokens in equal parts. Choices (`topk`, routing) have no
gradient. Dense attention takes a shorter way to the same numbers, for the heads that are asked about alone.

A mechanism that remembers tokens in a state of its own (`Mechanism.memory`) can't be asked: what it reads there
belongs to no token. It does not know which heads are worth asking, nor what the mass says of an answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.attention.base import Hints, Mechanism
from longspan.attention.evicting import Evicting
from longspan.attention.row_attention import attend_rows, sides
from longspan.kv.base import PAGE, LayerKV
from longspan.kv.kept import KeptKV
from longspan.kv.rows import KeptRows

_HELD = 1 << 22
"""Weights that are held at once (16 MiB in float32), by which queries are cut into tiles."""
_BLOCK = 1 << 18
"""Keys that are widened to float32 at once."""


@torch.inference_mode(False)
def reads(mechanism: Mechanism, q: Tensor, kv: LayerKV, heads: Sequence[int], *, scale: float, hints: Hints) -> Tensor:
    """Return the attention mass that the last T queries put on each token.

    Args:
        mechanism: by what they attend; it must keep no memory of its own.
        q: unrotated queries `[1, Hq, T, D]` of the positions `N - T .. N - 1`; any float type.
        kv: the layer's keys and values.
        heads: query heads that are asked about.
        scale: what scores are multiplied by.
        hints: as for `Mechanism.attend`.

    Returns:
        float32 `[heads, N]` on q's device, summed over the queries: a row sums to T where each reads anything.
    """
    count, stop = q.shape[2], kv.length
    first = stop - count
    dense = mechanism.exact or mechanism.prefill_only
    if dense and kv.readable() is None:
        return _reads_all(q, kv, heads, scale)
    found = torch.zeros(len(heads), stop, device=q.device)
    step = max(1, min(mechanism.gpu_tile if q.is_cuda else mechanism.tile, _HELD // (q.shape[1] * stop)))
    edges = {*range(0, count, step), count}
    trained = None if kv.rotary is None else kv.rotary.trained_length
    if trained is not None and first < trained < stop:
        edges.add(trained - first)
    for start, end in itertools.pairwise(sorted(edges)):
        with torch.enable_grad():
            told = _Told(kv, first + end)
            out = mechanism.attend_tile(q[:, :, start:end].float().clone(), told, first + start, scale, hints)
        found[:, : first + end] += _weights(out, told.numbers, heads)[..., 0].sum(1)
    return found


@torch.inference_mode(False)
def reads_of_rows(mechanism: Evicting, q: Tensor, kv: KeptKV, heads: Sequence[int], *, scale: float) -> Tensor:
    """As `reads`, where each KV head holds rows of its own choice: what a head evicted has mass 0."""
    found = torch.zeros(len(heads), kv.length, device=q.device)
    size = q.shape[1] // len(kv.groups)
    for i, (rows, part) in enumerate(kv.split(q)):
        own = [(place, head - i * size) for place, head in enumerate(heads) if head // size == i]
        if not own:
            continue
        masses = _of_rows(mechanism, part, rows, [head for _, head in own], scale)
        tokens = rows.positions().to(q.device)
        for (place, head), mass in zip(own, masses, strict=True):
            found[place].index_add_(0, tokens[head // (part.shape[1] // tokens.shape[0])], mass)
    return found


def _reads_all(q: Tensor, kv: LayerKV, heads: Sequence[int], scale: float) -> Tensor:
    count, stop = q.shape[2], kv.length
    found = torch.zeros(len(heads), stop, device=q.device)
    with torch.no_grad():
        k = _own_keys(kv, stop)[0]
        turned = kv.queries_from(q[:, list(heads)].float().clone(), stop - count)[0]
        group = q.shape[1] // k.shape[0]
        step = max(1, _HELD // stop)
        for start in range(0, count, step):
            seen = stop - count + min(start + step, count)
            for place, head in enumerate(heads):
                scores = _scores(turned[place, start : start + step], k[head // group, :seen]) * scale
                newer = torch.ones(len(scores), len(scores), dtype=torch.bool, device=q.device).triu(1)
                scores[:, seen - len(scores) :].masked_fill_(newer, float("-inf"))
                found[place, :seen] += torch.softmax(scores, -1).sum(0)
    return found


@torch.inference_mode()
def _own_keys(kv: LayerKV, stop: int) -> Tensor:
    """Pages write to a copy of their own as they rotate, which inference mode alone allows."""
    keys: Tensor = kv.keys_at_own_positions(0, stop)
    return keys


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return float32 `q @ k.T`; keys are widened block by block, never all at once."""
    return torch.cat([q @ block.float().mT for block in k.split(_BLOCK)], 1)


def _of_rows(mechanism: Evicting, q: Tensor, rows: KeptRows, heads: Sequence[int], scale: float) -> Tensor:
    """Return the mass `[heads, rows.held]` of the queries `[1, Hq, T, D]` of one group of heads."""
    count = q.shape[2]
    token, row = rows.length - count, rows.held - count
    found = torch.zeros(len(heads), rows.held, device=q.device)
    for start, stop, own in sides(rows, token, count):
        with torch.inference_mode():
            k = rows.keys_as_read(row + stop, own).float()
        # What chooses among its rows in decode is asked step by step, as it decoded.
        pieces = [(start, stop)] if mechanism.reads_all else [(i, i + 1) for i in range(start, stop)]
        for begin, end in pieces:
            with torch.enable_grad():
                part = q[:, :, begin:end].float().clone()
                turned = part if rows.rotary is None else rows.rotary.range(part, (token if own else row) + begin)
                seen = k[:, :, : row + end]
                v = torch.zeros(*seen.shape[:3], 1, device=q.device, requires_grad=True)
                if mechanism.reads_all:
                    out = attend_rows(turned, seen, v, scale, max(1, _HELD // (q.shape[1] * seen.shape[2])))[0]
                else:
                    out = mechanism.decode(turned, seen, v, rows, own, scale)
            found[:, : row + end] += _weights(out, v, heads)[..., 0].sum(1)
    return found


def _weights(out: Tensor, numbers: Tensor, heads: Sequence[int]) -> Tensor:
    """Return the gradients `[heads, Hkv, N, 1]` of each head's output, summed, by the numbers that stand as values."""
    last = len(heads) - 1
    each = [
        torch.autograd.grad(out[:, head].sum(), numbers, retain_graph=i < last)[0][0] for i, head in enumerate(heads)
    ]
    return torch.stack(each)


class _Told(LayerKV):
    """A layer's first tokens, with a number of each as its value."""

    def __init__(self, kv: LayerKV, length: int) -> None:
        """Take the layer, and how many tokens are read."""
        self._kv, self._length, self.rotary = kv, length, kv.rotary
        with torch.inference_mode():
            one = kv.keys(0, 0)
        self.numbers = torch.zeros(1, one.shape[1], length, 1, device=one.device, requires_grad=True)

    @property
    def length(self) -> int:
        """See `LayerKV`."""
        return self._length

    def keys(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        with torch.inference_mode():
            return self._kv.keys(start, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        return self.numbers[:, :, start:stop]

    def gather_keys(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        with torch.inference_mode():
            return self._kv.gather_keys(index)

    def gather(self, index: Tensor, *, rotated: bool) -> tuple[Tensor, Tensor]:
        """See `LayerKV`."""
        with torch.inference_mode():
            k = self._kv.gather(index, rotated=rotated)[0]
        return k, self.numbers.gather(2, index.to(self.numbers.device).unsqueeze(-1))

    def gather_values(self, index: Tensor) -> Tensor:
        """See `LayerKV`."""
        return self.numbers[:, :, index.to(self.numbers.device)]

    def summary(self, what: str, block: int = PAGE) -> Tensor:
        """See `LayerKV`."""
        full = self._length // block
        if what == "mean_value":
            means: Tensor = self.numbers[:, :, : full * block].unflatten(2, (full, block)).mean(3)
            return means
        with torch.inference_mode():
            kept = self._kv.summary(what, block)
        return kept[:, :, :full]

    def readable(self) -> Tensor | None:
        """See `LayerKV`."""
        with torch.inference_mode():
            found: Tensor | None = self._kv.readable()
        return None if found is None else found[: -(-self._length // PAGE)].clone()

    def keys_at_own_positions(self, start: int, stop: int) -> Tensor:
        """See `LayerKV`."""
        with torch.inference_mode():
            return self._kv.keys_at_own_positions(start, stop)
