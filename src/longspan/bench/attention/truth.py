"""What attention must give, row by row in float64: what outputs are checked against before anything is timed.

Written from the equations alone (module docstring of `attention/superlinear.py`; arXiv 2601.18401): it shares no code
with the mechanisms or the kernels, and takes the keys that one row reads and nothing else, so that a few rows of a
context of 10M tokens fit beside that context. It is differentiable. It knows the mechanisms listed in `KNOWN`.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.attention import Mechanism
from longspan.attention.superlinear import Superlinear
from longspan.bench.attention.inputs import Inputs
from longspan.errors import UsageError

KNOWN = ("dense", "superlinear")
_OPTIONS = {
    "window", "spans", "backward", "forward", "power", "span_power", "gate", "summary", "sinks", "share",
}  # fmt: skip
_PAGE = 64
_BLOCK = 1 << 18
"""Keys of the context that dense rows read at a time: 268 MB in float64 for a head size of 128."""
_SURE = 1e-5
"""Of the greatest score: search scores that differ by less may change places when they are summed in float32."""


@dataclass(frozen=True)
class Row:
    """One query of one head."""

    head: int
    query: int
    """Among the inputs' T queries."""


@dataclass(frozen=True)
class Choice:
    """What one row of superlinear attention reads."""

    near: Tensor
    """Keys of window and sinks, ascending."""
    spans: tuple[tuple[int, int], ...]
    """First and last key of each span."""
    anchors: Tensor
    """The anchors chosen, one a span."""
    candidates: int
    """Anchors that were searched."""
    sure: bool
    """Whether no other anchor comes so near in score that rounding might choose it."""


def checked(mechanism: Mechanism) -> Mechanism:
    """Return a mechanism if its rows can be computed here (UsageError: they can't)."""
    if mechanism.name not in KNOWN:
        raise UsageError(f"attention {mechanism.name!r} can't be checked here: use one of {', '.join(KNOWN)}")
    for option, default in type(mechanism).options().items():
        if mechanism.name == "superlinear" and option not in _OPTIONS and getattr(mechanism, option) != default:
            raise UsageError(f"superlinear can't be checked with {option} set: leave it out")
    return mechanism


def attended(mechanism: Mechanism, inputs: Inputs, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return what rows must be, and which of them are sure.

    Args:
        mechanism: one that `checked` let pass.
        inputs: in any float type.
        rows: which rows.

    Returns:
        float64 `[R, D]`, and bool `[R]`: False where the search is too close to call in float32.
    """
    if mechanism.name == "dense":
        return _dense(inputs, rows), torch.ones(len(rows), dtype=torch.bool)
    assert isinstance(mechanism, Superlinear)
    outs, sure = [], []
    for row in rows:
        choice = chosen(mechanism, inputs, row)
        outs.append(_superlinear(mechanism, inputs, row, choice))
        sure.append(choice.sure)
    return torch.stack(outs), torch.tensor(sure)


def chosen(mechanism: Superlinear, inputs: Inputs, row: Row) -> Choice:
    """Return what a row reads."""
    q, k, _ = _of(inputs, row)
    t = inputs.first + row.query
    table = steps(mechanism.power, inputs.k.shape[2] + mechanism.window + 1)
    first = bisect.bisect_left(table, mechanism.window + 1)
    window = table[first] - 1  # rounded up to where the newest anchor can touch it
    near = torch.arange(max(0, t - window + 1), t + 1)
    near = torch.cat([torch.arange(min(mechanism.sinks, int(near[0]))), near]).to(k.device)
    anchors = t + 1 - torch.tensor(table[first : bisect.bisect_right(table, t + 1)], dtype=torch.int64)  # newest first
    if not len(anchors) or not mechanism.spans:
        return Choice(near, (), anchors[:0].to(k.device), len(anchors), sure=True)
    scores = _searched(mechanism, inputs, row, q.detach(), k.detach(), anchors)
    # Sorted stably, so that of equal anchors the newer one comes first.
    ranked, order = torch.sort(scores, descending=True, stable=True)
    best = anchors[order[: mechanism.spans].cpu()]
    sure = True
    if len(anchors) > mechanism.spans:
        gap = float(ranked[mechanism.spans - 1] - ranked[mechanism.spans])
        sure = gap == 0 or gap > _SURE * float(ranked.abs().max())
    reach = float(t + 1) ** mechanism.span_power
    backward, forward = math.ceil(mechanism.backward * reach), math.ceil(mechanism.forward * reach)
    spans = tuple((max(0, a - backward), min(a + forward, t - window)) for a in best.tolist())
    return Choice(near, spans, best.to(k.device), len(anchors), sure)


def _superlinear(mechanism: Superlinear, inputs: Inputs, row: Row, choice: Choice) -> Tensor:
    q, k, v = _of(inputs, row)
    reads = [torch.arange(lo, hi + 1, device=k.device) for lo, hi in choice.spans]
    if mechanism.gate == "joint" or not reads:
        return _softmax(q, k, v, torch.unique(torch.cat([choice.near, *reads])))
    each = torch.stack([_softmax(q, k, v, torch.unique(torch.cat([choice.near, span]))) for span in reads])
    return torch.softmax(_searched(mechanism, inputs, row, q, k, choice.anchors), 0) @ each


def _searched(mechanism: Superlinear, inputs: Inputs, row: Row, q: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
    """Return the search scores of anchors: a row's own, or the sum over the heads that share its KV head."""
    if mechanism.share == "head":
        return _scores(mechanism.summary, q, k, anchors)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    first = row.head // group * group
    heads = [q if first + i == row.head else inputs.q[0, first + i, row.query].double() for i in range(group)]
    return torch.stack([_scores(mechanism.summary, one, k, anchors) for one in heads]).sum(0)


def _softmax(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Attend from one row to some keys; `1/sqrt(D)` scales."""
    weights = torch.softmax(k[keys].double() @ q / math.sqrt(q.shape[-1]), 0)
    return weights @ v[keys].double()


def _scores(summary: str, q: Tensor, k: Tensor, anchors: Tensor) -> Tensor:
    """Return the search scores of anchors: their own keys', or the greatest that a key of their page could have."""
    anchors = anchors.to(k.device)
    if summary == "key":
        return k[anchors].double() @ q
    pages = anchors.unsqueeze(1) // _PAGE * _PAGE + torch.arange(_PAGE, device=k.device)
    lowest, highest = k[pages].double().aminmax(dim=1)
    return torch.maximum(q * lowest, q * highest).sum(-1)


def _dense(inputs: Inputs, rows: Sequence[Row]) -> Tensor:
    """Attend from rows to all keys before them, a block of keys at a time, softmax carried along."""
    outs: dict[Row, Tensor] = {}
    group = inputs.q.shape[1] // inputs.k.shape[1]
    for head in range(inputs.k.shape[1]):
        own = [row for row in rows if row.head // group == head]
        if not own:
            continue
        q = torch.stack([_of(inputs, row)[0] for row in own]) / math.sqrt(inputs.q.shape[-1])
        at = torch.tensor([inputs.first + row.query for row in own], device=q.device).unsqueeze(1)
        lse = q.new_full((len(own), 1), -math.inf)
        out = torch.zeros_like(q)
        for start in range(0, int(at.max()) + 1, _BLOCK):
            k, v = (x[0, head, start : start + _BLOCK].double() for x in (inputs.k, inputs.v))
            later = torch.arange(start, start + len(k), device=q.device) > at
            scores = (q @ k.T).masked_fill(later, -math.inf)
            new = torch.logaddexp(lse, torch.logsumexp(scores, 1, keepdim=True))
            out = out * torch.exp(lse - new) + torch.exp(scores - new) @ v
            lse = new
        outs |= dict(zip(own, out, strict=True))
    return torch.stack([outs[row] for row in rows])


def _of(inputs: Inputs, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Return a row's query in float64 `[D]`, and the keys and values `[N, D]` of its head."""
    head = row.head // (inputs.q.shape[1] // inputs.k.shape[1])
    return inputs.q[0, row.head, row.query].double(), inputs.k[0, head], inputs.v[0, head]


@functools.lru_cache(maxsize=4)
def steps(power: float, limit: int) -> list[int]:
    """Return `floor(i^(1/power))` for i = 1, 2, ... until one passes `limit`; whole exponents in integers."""
    exponent = 1 / power
    whole = round(exponent) if exponent.is_integer() else None
    table = [1]
    while table[-1] <= limit:
        i = len(table) + 1
        table.append(math.floor(i**exponent) if whole is None else i**whole)
    return table
