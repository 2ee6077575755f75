"""Logits in, the next token out: greedy, or drawn with temperature, top-k, min-p and top-p.

The order is fixed: bias, penalties, what is allowed, temperature, top-k, min-p, top-p; each works on what the one
before left. It knows one answer at a time and nothing of text: `max_tokens` and `stop` travel in `SamplingParams`
for the decode loop to honour. The same seed gives the same tokens on one device and version of torch, not
across them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longspan.engine.stops import normalise_stops
from longspan.errors import ModelError, UsageError

_HEAD = 1024  # likeliest tokens, which mostly hold top-p's mass; sorting all 150K takes milliseconds on a CPU


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn and where it ends.

    Attributes:
        max_tokens: most tokens of the answer, at least 1.
        temperature: 0 (greedy) to 100; logits are divided by it.
        top_p: above 0, up to 1 (off): the smallest set of likeliest tokens whose mass reaches it
            (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
        top_k: the k likeliest tokens; 0 is off.
        min_p: 0 (off) to 1: tokens at least that times as likely as the likeliest (Nguyen et al. 2024,
            arXiv 2407.01082).
        repetition_penalty: above 0, up to 100; 1 is off. Logits of tokens that came before are divided by it
            where positive and multiplied where negative, each once (Keskar et al. 2019, arXiv 1909.05858; the
            formula there divides always, which would favour a repeated token of negative logit).
        presence_penalty: -100 to 100; subtracted once from the logit of each token of the answer so far.
        frequency_penalty: -100 to 100; subtracted from it as often as it came (both as OpenAI's API has them).
        logit_bias: pairs of token id and what is added to its logit, or a mapping; at most 100 either way.
        seed: 0 to 2^63 - 1; None draws one from the operating system.
        stop: strings that end the answer; a string alone or a list becomes a tuple.

    Raises:
        UsageError: a value that isn't of its kind or in its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Check every value; make floats of whole numbers and a tuple of the stops."""
        self._whole("max_tokens", 1, math.inf, "a whole number of at least 1")
        self._whole("top_k", 0, math.inf, "a whole number of at least 0 (0 is off)")
        if self.seed is not None:
            self._whole("seed", 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1, or None")
        self._number("temperature", 0.0, 100.0, "a number from 0 (greedy) to 100")
        self._number("min_p", 0.0, 1.0, "a number from 0 (off) to 1")
        self._number("top_p", 0.0, 1.0, "a number above 0, up to 1 (off)", above=True)
        self._number("repetition_penalty", 0.0, 100.0, "a number above 0, up to 100 (1 is off)", above=True)
        self._number("presence_penalty", -100.0, 100.0, "a number from -100 to 100 (0 is off)")
        self._number("frequency_penalty", -100.0, 100.0, "a number from -100 to 100 (0 is off)")
        object.__setattr__(self, "stop", normalise_stops(self.stop))
        object.__setattr__(self, "logit_bias", _normalise_bias(self.logit_bias))

    @property
    def looks_back(self) -> bool:
        """Whether what was said before changes what is likely."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def another(self, number: int) -> SamplingParams:
        """Return these for another answer to the same: with a seed of its own, where one is given."""
        return self if self.seed is None else replace(self, seed=(self.seed + number) % 2**63)

    def _whole(self, name: str, low: int, high: float, allowed: str) -> None:
        value: object = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low or value > high:
            raise UsageError(f"{name} is {value!r}: it must be {allowed}")

    def _number(self, name: str, low: float, high: float, allowed: str, *, above: bool = False) -> None:
        value: object = getattr(self, name)
        # NaN fails both comparisons, which is how it is refused.
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise UsageError(f"{name} is {value!r}: it must be {allowed}")
        if above and value == low:
            raise UsageError(f"{name} is {value!r}: it must be {allowed}")
        object.__setattr__(self, name, float(value))


def _normalise_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """Return a bias as pairs in the order of tokens (UsageError: it is none)."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        found = {int(token): float(value) for token, value in pairs}  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise UsageError(f"logit_bias is {bias!r}: give a number for each token id") from None
    for token, value in found.items():
        if token < 0 or not -100.0 <= value <= 100.0:
            raise UsageError(f"logit_bias adds {value} to token {token}: token ids are from 0, numbers -100 to 100")
    return tuple(sorted(found.items()))


def distribution(
    logits: Tensor, params: SamplingParams, history: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Return the probabilities that `Sampler` draws from.

    Args:
        logits: `[V]`, any float type, read in float32; -inf is a token that can't be drawn.
        params: temperature 0 gives all the mass to the largest logit.
        history: `[N]` token ids in 0..V-1 of the answer so far, for the penalties; ids may repeat.
        allowed: which tokens can be drawn at all, bool `[V]` or a bitmask int32 (`unpacked`); None: all.

    Returns:
        `[V]` float32 on the device of the logits, sum 1. Of equally likely tokens at the edge of top-k or
        top-p the lower ids stay.

    Raises:
        UsageError: logits that aren't one row.
        ModelError: logits with NaN or +inf, or nothing but -inf.
    """
    scores = _scores(logits, params, history, allowed)
    if params.temperature == 0.0:
        return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1.0)
    # The largest is subtracted first, so that a small temperature can't overflow; the weights are probabilities
    # times a constant, 1 for the likeliest. A temperature that float32 rounds to 0 would give 0/0 there.
    temperature = max(params.temperature, torch.finfo(torch.float32).tiny)
    weights = ((scores - scores.max()) / temperature).exp()
    if 0 < params.top_k < len(weights):
        edge = weights.topk(params.top_k).values[-1]
        weights = _largest(weights, edge, params.top_k)
    if params.min_p > 0.0:
        weights = torch.where(weights >= params.min_p, weights, 0.0)
    if params.top_p < 1.0:
        weights = _nucleus(weights, params.top_p)
    return weights / weights.sum()


class Sampler:
    """Draws tokens for one answer, with a random generator of its own: no global one is read or moved.

    Args:
        params: how to draw.
        device: where to draw; logits from elsewhere are copied there.
    """

    def __init__(self, params: SamplingParams, device: torch.device | str = "cpu") -> None:
        self.params = params
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor, history: Tensor | None = None, allowed: Tensor | None = None) -> int:
        """Return the next token's id; arguments and errors are those of `distribution`.

        Temperature 0 takes the largest logit, the lowest id among equals, and draws no random number.
        """
        logits = logits.to(self.device)
        if self.params.temperature == 0.0:
            return int(_scores(logits, self.params, history, allowed).argmax())
        probabilities = distribution(logits, self.params, history, allowed)
        # The inverse of the cumulative distribution at one random number: some ten times cheaper for 150K tokens
        # than torch.multinomial, which draws one a token. In float64 (which MPS lacks), or the tokens below 6e-8
        # would be lost to rounding: together they can hold a percent.
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        reached = probabilities.cumsum(0, dtype=exact)
        # 1 - drawn is in (0, 1]: the first token to reach that share adds to the sum, so its probability isn't 0.
        return int(torch.searchsorted(reached, (1 - self.uniform()) * reached[-1]))

    def uniform(self) -> float:
        """Return the next random number in [0, 1), for whoever draws for several answers at once."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        return float(torch.rand((), generator=self._generator, dtype=exact, device=self.device))


def _scores(logits: Tensor, params: SamplingParams, history: Tensor | None, allowed: Tensor | None = None) -> Tensor:
    """Return checked float32 logits `[V]` after bias, penalties and mask; the largest is finite."""
    if logits.dim() != 1 or logits.numel() == 0:
        raise UsageError(f"logits have the shape {list(logits.shape)}: one row [V] is needed")
    scores = logits.detach().float()
    largest = float(scores.max())  # NaN if any is NaN
    if math.isnan(largest):
        raise ModelError(
            "the model's logits hold NaN, most likely an overflow in half precision: use bfloat16 or float32"
        )
    if largest == math.inf:
        raise ModelError(
            "the model's logits hold +inf, most likely an overflow in half precision: use bfloat16 or float32"
        )
    if largest == -math.inf:
        raise ModelError("all of the model's logits are -inf, most likely a mask that allows no token: loosen it")
    if params.logit_bias:
        scores = _biased(scores, params.logit_bias)
    if params.looks_back and history is not None:
        ids = history.to(scores.device, torch.long)
        assert bool(((ids >= 0) & (ids < len(scores))).all()), "history holds ids outside the logits"
        scores = _penalised(scores, params, ids)
    if allowed is not None:
        scores = scores.masked_fill(~unpacked(allowed.to(scores.device), len(scores)), -math.inf)
        if not bool((scores > -math.inf).any()):
            raise ModelError("the constraint allows no token that the model could say: loosen it")
    return scores


def unpacked(allowed: Tensor, size: int) -> Tensor:
    """Return which of `size` tokens are allowed, bool `[size]`, from that or from a bitmask int32 `[ceil(size / 32)]`.

    A mask of a larger vocabulary is cut, and tokens that a smaller one does not know are not allowed.
    """
    if allowed.dtype != torch.bool:
        bits = torch.arange(32, dtype=torch.int32, device=allowed.device)
        allowed = ((allowed.view(-1, 1) >> bits) & 1).bool()
    flat = allowed.reshape(-1)[:size]
    return torch.nn.functional.pad(flat, (0, size - len(flat)))


def _biased(scores: Tensor, bias: tuple[tuple[int, float], ...]) -> Tensor:
    ids = torch.tensor([token for token, _ in bias], device=scores.device)
    if int(ids.max()) >= len(scores):
        raise UsageError(f"logit_bias names token {int(ids.max())}: the model has {len(scores)}")
    return scores.index_add(0, ids, torch.tensor([value for _, value in bias], device=scores.device))


def _penalised(scores: Tensor, params: SamplingParams, ids: Tensor) -> Tensor:
    """Return scores less likely for what was said, each token as often as `ids` names it."""
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(ids, minlength=len(scores)).to(scores.dtype)
        scores = scores - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty
    if params.repetition_penalty == 1.0:
        return scores
    seen = scores[ids]
    changed = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    limits = torch.finfo(torch.float32)
    # Only what was masked may be infinite: the penalty must neither mask a token nor make it certain.
    changed = torch.where(seen.isinf(), seen, changed.clamp(limits.min, limits.max))
    return scores.index_put((ids,), changed)  # a repeated id writes the same value again


def _largest(weights: Tensor, edge: Tensor, count: int | Tensor) -> Tensor:
    """Zero all of `weights` `[V]` but the `count` largest, the last being `edge`; lower ids win a tie."""
    above = weights > edge
    level = weights == edge
    keep = above | (level & (level.cumsum(0) <= count - above.sum()))
    return torch.where(keep, weights, 0.0)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Zero all of `weights` `[V]` but the smallest set of largest ones that holds `top_p` of their sum."""
    target = top_p * weights.sum()
    ordered = weights.topk(min(_HEAD, len(weights))).values
    mass = ordered.cumsum(0)
    if len(ordered) < len(weights) and mass[-1] < target:
        ordered = weights.sort(descending=True).values
        mass = ordered.cumsum(0)
    # Rounding can leave even the full sum short of a target near 1: then all stay.
    count = ((mass < target).sum() + 1).clamp(max=len(ordered))
    return _largest(weights, ordered[count - 1], count)
