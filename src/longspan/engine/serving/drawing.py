"""The next tokens of many answers from their logits: at once for all that draw alike, one by one for the others.

Most answers only differ in temperature, bias and whether probabilities are told: for these a step costs a few calls,
however many they are. What each says is what `Sampler` alone would draw. It does not know how answers go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.engine.serving.choice import Choice, told
from longspan.engine.serving.events import TokenLogprob

Drawn = tuple[int, tuple[TokenLogprob, ...]]
"""A token, and its probabilities where they are told."""


def draw(logits: Tensor, choices: Sequence[Choice]) -> list[Drawn | Exception]:
    """Return what each answer says next.

    Args:
        logits: float32 `[B, V]`.
        choices: one for each row.

    Returns:
        For each what it draws, or the error of the one that could not.
    """
    made: list[Drawn | Exception] = []
    alike = _alike(logits, choices)
    for at, choice in enumerate(choices):
        if at in alike:
            made.append(alike[at])
            continue
        try:
            made.append(choice.draw(logits[at]))
        except Exception as error:
            made.append(error)
    return made


def _alike(logits: Tensor, choices: Sequence[Choice]) -> dict[int, Drawn]:
    """Return what those answers draw, by their rows, that draw alike; rows that are not sound are left out."""
    if not logits.numel():
        return {}
    # NaN and infinity are told by the sampler, in its words.
    sound = logits.amax(-1).isfinite().tolist()
    rows = [at for at, choice in enumerate(choices) if sound[at] and choice.alike(logits.shape[1])]
    if not rows:
        return {}
    asked = [choices[at] for at in rows]
    own = logits if len(rows) == len(choices) else logits[rows]
    tokens = _tokens(own, asked)
    found: dict[int, Drawn] = {row: (token, ()) for row, token in zip(rows, tokens, strict=True)}
    telling = [at for at, choice in enumerate(asked) if choice.logprobs is not None]
    if telling:
        most = max(asked[at].logprobs or 0 for at in telling)
        rows_told = told(own if len(telling) == len(asked) else own[telling], [tokens[at] for at in telling], most)
        for at, each in zip(telling, rows_told, strict=True):
            few = TokenLogprob(each.token, each.logprob, each.top[: asked[at].logprobs or 0])
            found[rows[at]] = (tokens[at], (few,))
    return found


def _tokens(logits: Tensor, choices: Sequence[Choice]) -> list[int]:
    """Return the token that each row's answer draws, sound rows `[B, V]` of answers that draw alike."""
    scores = logits
    biased = [(row, choice.bias) for row, choice in enumerate(choices) if choice.bias is not None]
    if biased:
        at = torch.cat([torch.full_like(ids, row) for row, (ids, _) in biased])
        ids, values = (torch.cat(parts) for parts in zip(*(bias for _, bias in biased), strict=True))
        scores = scores.index_put((at, ids), values, accumulate=True)
    likeliest = scores.max(-1)
    tokens: list[int] = likeliest.indices.tolist()
    drawn = [row for row, choice in enumerate(choices) if not choice.likeliest]
    if not drawn:
        return tokens
    scores, best = scores[drawn], likeliest.values[drawn].unsqueeze(1)
    temperatures = torch.tensor([choices[row].temperature for row in drawn], device=scores.device).unsqueeze(1)
    weights = ((scores - best) / temperatures).exp()
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    reached = weights.cumsum(-1, dtype=exact)
    shares = torch.tensor([choices[row].uniform() for row in drawn], dtype=exact).to(scores.device).unsqueeze(1)
    found = torch.searchsorted(reached, (1 - shares) * reached[:, -1:])[:, 0].tolist()
    for row, token in zip(drawn, found, strict=True):
        tokens[row] = token
    return tokens
