"""One answer of a request: its context, how it draws tokens, and the text that they make.

It does not know where logits come from, nor other answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longspan.engine.kv_context import KVContext
from longspan.engine.sampler import Sampler, SamplingParams
from longspan.engine.serving.events import TokenLogprob
from longspan.engine.serving.requests import Constraint
from longspan.engine.stops import TextStream
from longspan.hf.model import CausalModel


class Choice:
    """An answer that is being written."""

    def __init__(
        self,
        model: CausalModel,
        context: KVContext,
        index: int,
        params: SamplingParams,
        room: int,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Begin without a token.

        Args:
            model: whose tokens are drawn.
            context: after the prompt; this answer's own.
            index: among the request's.
            params: how tokens are drawn.
            room: tokens that the window has room for.
            logprobs: of how many likeliest tokens probabilities are told; None: of none.
            constraint: what limits the answer; None: nothing.
        """
        self.model, self.context, self.index = model, context, index
        self.limit = min(params.max_tokens, room)
        self.tokens: list[int] = []
        self.text = ""
        self.reason: str | None = None
        """How it ended; None: it has not."""
        self.logprobs, self._constraint, self._params = logprobs, constraint, params
        self._sampler = Sampler(params, model.device)
        self._stream = TextStream(model.decode, params.stop)
        self.likeliest = params.temperature == 0.0
        """Whether the likeliest token is drawn."""
        self.temperature = max(params.temperature, torch.finfo(torch.float32).tiny)
        """By which differences of scores are divided, where tokens are drawn by chance."""
        self.bias: tuple[Tensor, Tensor] | None = None
        """Token ids, and what is added to their scores."""
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self.bias = torch.tensor(ids, device=model.device), torch.tensor(values, device=model.device)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self._stream.stopped

    def alike(self, size: int) -> bool:
        """Whether temperature and bias alone say how it draws from a vocabulary of a size: so draw most answers."""
        params = self._params
        cut = params.top_k or params.min_p > 0.0 or params.top_p < 1.0
        known = not params.logit_bias or params.logit_bias[-1][0] < size  # sorted by ids
        return known and not cut and not params.looks_back and self._constraint is None

    def uniform(self) -> float:
        """Return the next random number in [0, 1) of those by which it draws."""
        return self._sampler.uniform()

    def draw(self, logits: Tensor) -> tuple[int, tuple[TokenLogprob, ...]]:
        """Return the next token by float32 logits `[V]`, and its probabilities where they are told."""
        history = None
        if self.tokens and self._params.looks_back:
            history = torch.tensor(self.tokens, device=logits.device)
        allowed = None if self._constraint is None else self._constraint.allowed()
        token = self._sampler(logits, history, allowed)
        if self.logprobs is None:
            return token, ()
        return token, tuple(told(logits.unsqueeze(0), [token], self.logprobs))

    def take(self, token: int) -> str | None:
        """Add a token and return the text that it makes certain; None: it ends the answer and has none."""
        if token in self.model.end_tokens:
            self.reason = "stop"
            return None
        if self._constraint is not None:
            self._constraint.accept(token)
        self.tokens.append(token)
        piece = self._stream.push(token)
        if self._stream.stopped is not None:
            self.reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.reason = "length"
        if piece:
            self.text += piece
        return piece

    def finish(self) -> str:
        """Say that no token follows; returns the text that was held back."""
        rest = self._stream.finish()
        self.text += rest
        if self._stream.stopped is not None:  # also one that waited for a longer one
            self.reason = "stop"
        return rest


def told(logits: Tensor, tokens: Sequence[int], count: int) -> Iterator[TokenLogprob]:
    """Return how likely tokens were by float32 logits `[T, V]`, and the `count` likeliest beside each."""
    rows = logits.log_softmax(-1)
    own = rows.gather(1, torch.tensor([list(tokens)], device=rows.device).T)[:, 0].tolist()
    best = rows.topk(min(count, rows.shape[1]))
    for token, mine, ids, values in zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True):
        yield TokenLogprob(token, mine, tuple(zip(ids, values, strict=True)))
