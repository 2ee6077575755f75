"""Greedy answers from several contexts at once: one forward pass a token for all of them.

The next tokens of all contexts go through the layers side by side, as if they were one text; only attention keeps them
apart. Where an answer reads every row that is held, the rows of all contexts are stacked once, padded in front, and
each layer attends in one call. Elsewhere each context's own reader attends to its token. It does not know questions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.engine.kv_context import KVContext
from longspan.hf.attention import Reader
from longspan.hf.model import CausalModel
from longspan.kv.rotary import Rotary

_PART = 256
"""Rows that are multiplied together: a product over many thousands of rows with three queries keeps few of a GPU's
processors busy."""


def continued(
    model: CausalModel,
    contexts: Sequence[KVContext],
    first: Sequence[int],
    most: int,
    done: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """Return what the model writes after each context, greedily.

    Args:
        model: that read them.
        contexts: after their questions; nothing is added to them.
        first: the first token of each.
        most: tokens of the longest.
        done: told a context's number and what was written; whether that is all. It is asked once after each token, and
            never again once it was.

    Returns:
        The tokens of each, those that ended it among them.
    """
    written = [[token] for token in first]
    going = {i for i, tokens in enumerate(written) if not done(i, tokens)}
    if model.state_spec:
        for i in going:
            _alone(contexts[i], written[i], most, functools.partial(done, i))
        return written
    reader = _reader(model, contexts, most)
    try:
        for _ in range(most - 1):
            if not going:
                break
            logits = model.forward([tokens[-1] for tokens in written], reader, logits=len(contexts))
            assert logits is not None, "logits were asked for"
            for i, token in enumerate(logits.argmax(-1).tolist()):
                if i in going:
                    written[i].append(token)
                    if done(i, written[i]):
                        going.discard(i)
    finally:
        for context in contexts:
            context.truncate(context.length)
    return written


def _alone(context: KVContext, written: list[int], most: int, done: Callable[[list[int]], bool]) -> None:
    """Write on after one context, whose layers carry a state that can't be stacked."""
    before = context.length
    while len(written) < most:
        written.append(int(context.step(written[-1:]).argmax()))
        if done(written):
            break
    context.truncate(before)


def _reader(model: CausalModel, contexts: Sequence[KVContext], most: int) -> Reader:
    longest = max(context.length for context in contexts) + most
    whole = all(context.answers_by.reads_all for context in contexts) and not any(model.windows)
    if whole and longest <= model.dimensions.window:
        layers = [_stacked([_rows(context, i) for context in contexts], most) for i in range(model.dimensions.layers)]
        positions = torch.tensor([context.length for context in contexts], device=model.device)
        return _Together(layers, positions, model.rotary)
    return _Apart([context.answering() for context in contexts])


@dataclass
class _Apart:
    """Every context's own reader, for its token."""

    readers: list[Reader]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        parts = zip(self.readers, *(x.split(1, 2) for x in (q, k, v)), strict=True)
        return torch.cat([reader.attend(layer, *part, scale) for reader, *part in parts], 2)


@dataclass
class _Layer:
    """The rows of all contexts in one layer, `[B, Hkv, N, D]`."""

    k: Tensor
    v: Tensor
    bias: Tensor
    """What is added to scores, `[B, Hkv, 1, N]`: 0 for rows that are there, -inf for padding and those to come."""
    held: int
    """Rows so far, padding included; the answer's follow."""


@dataclass
class _Together:
    """All rows of all contexts, at the positions where an answer reads them."""

    layers: list[_Layer]
    positions: Tensor
    """Of each context's next token."""
    rotary: Rotary | None
    angles: tuple[Tensor, Tensor] | None = None
    """Of these positions: all layers of a step share them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows, (heads, batch) = self.layers[layer], q.shape[1:3]
        q = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        if self.rotary is not None:
            if layer == 0:
                self.angles = self.rotary.angles(self.positions, q)
                self.positions = self.positions + 1
            assert self.angles is not None, "the first layer comes first"
            q, k = self.rotary.turn(q, self.angles), self.rotary.turn(k.to(q.dtype), self.angles)
        rows.k[:, :, rows.held], rows.v[:, :, rows.held] = k[0].transpose(0, 1), v[0].transpose(0, 1)
        rows.bias[..., rows.held] = 0.0
        rows.held += 1
        # The heads of a group are the queries of their KV head. Nothing here waits for a GPU.
        grouped = (q[0].transpose(0, 1) * scale).reshape(batch, rows.k.shape[1], 1, -1, q.shape[3])
        stop = -(-rows.held // _PART)
        keys, values = (x.unflatten(2, (-1, _PART))[:, :, :stop].to(q.dtype) for x in (rows.k, rows.v))
        scores = (grouped @ keys.mT).transpose(2, 3).flatten(3)  # [B, Hkv, G, N]
        scores = scores + rows.bias[..., : stop * _PART]
        weights = torch.softmax(scores, -1).unflatten(3, (stop, _PART)).transpose(2, 3)
        out: Tensor = (weights @ values).sum(2)
        return out.view(1, batch, heads, -1).transpose(1, 2).to(v.dtype)


def _rows(context: KVContext, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Return each KV head's keys `[n, D]`, rotated to where the next token reads them, and values `[n, Dv]`."""
    kept = context.answers_from
    if kept is None:
        kv = context.layers[layer]
        return list(zip(kv.keys_at_own_positions(0, kv.length)[0], kv.values(0, kv.length)[0], strict=True))
    groups = kept.layers[layer].groups
    pairs = [(group.keys_as_read(group.held, True)[0], group.pages.values(0, group.held)[0]) for group in groups]
    return [head for k, v in pairs for head in zip(k, v, strict=True)]


def _stacked(contexts: list[list[tuple[Tensor, Tensor]]], room: int) -> _Layer:
    """Stack the rows of each context's heads, padded in front, with room for so many more."""
    most = max(k.shape[0] for heads in contexts for k, _ in heads)
    (k, v), batch, heads = contexts[0][0], len(contexts), len(contexts[0])
    size = -(-(most + room) // _PART) * _PART
    keys = k.new_zeros(batch, heads, size, k.shape[1])
    values = v.new_zeros(batch, heads, size, v.shape[1])
    bias = torch.full((batch, heads, 1, size), float("-inf"), device=k.device)
    for b, each in enumerate(contexts):
        for h, (k, v) in enumerate(each):
            start = most - k.shape[0]
            keys[b, h, start:most], values[b, h, start:most], bias[b, h, 0, start:most] = k, v, 0.0
    return _Layer(keys, values, bias, most)
