"""Choosing pages: how much attention the retrieval heads' queries put on each page, and which pages to read.

For each head, every token of the question attends to all keys, unrotated, by softmax; the mass that falls on a page,
summed over the question's tokens, is the head's vote for it. It does not know models or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kv.base import PAGE
from longspan.retrieval.heads import Head

_BLOCK = 1 << 18
"""Keys scored together: bounds the working memory at any length of context."""


@dataclass(frozen=True)
class Choice:
    """A page that was chosen, its share of the vote, and who chose it."""

    page: int
    score: float
    """Between 0 and 1: the share of the heads' attention (or of the lexical vote) that fell on it."""
    by: str
    """`heads`, `lexical` or `heads+lexical`."""


def token_mass(
    queries: Mapping[Head, Tensor],
    keys: Mapping[Head, Tensor],
    *,
    sinks: int,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return each head's attention mass on each token.

    Args:
        queries: each head's queries `[T, D]`, unrotated, float32, already multiplied by the scale of scores.
        keys: each head's keys `[N, D]`, unrotated, any float type.
        sinks: first keys that are left out.
        whole: where keys are a part of all, returns the log-sum-exps `[T]` over all from those over this part.

    Returns:
        float32 `[heads, N]` on the CPU, the mean over the question's tokens: a row sums to 1, or to 0 where no key is
        left.
    """
    return torch.stack([_one_head(q, keys[head], sinks, whole) for head, q in queries.items()])


def page_mass(mass: Tensor) -> Tensor:
    """Return the mass `[heads, ceil(N / 64)]` of each page, given that of each token `[heads, N]`."""
    pages = -(-mass.shape[1] // PAGE)
    return torch.nn.functional.pad(mass, (0, pages * PAGE - mass.shape[1])).view(mass.shape[0], pages, PAGE).sum(2)


def _one_head(q: Tensor, k: Tensor, sinks: int, whole: Callable[[Tensor], Tensor] | None) -> Tensor:
    length = k.shape[0]
    # Two passes, so that scores of all keys are never held at once.
    total = torch.full((q.shape[0],), float("-inf"), device=q.device)
    for start in range(0, length, _BLOCK):
        total = torch.logaddexp(total, torch.logsumexp(_scores(q, k, start, sinks), 1))
    total = total if whole is None else whole(total)
    # A question that sees no key has a total of -inf: subtracting it would give NaN.
    total = total.masked_fill(total == float("-inf"), 0.0)
    blocks = [
        torch.exp(_scores(q, k, start, sinks) - total.unsqueeze(1)).mean(0).cpu() for start in range(0, length, _BLOCK)
    ]
    return torch.cat(blocks) if blocks else torch.zeros(0)


def _scores(q: Tensor, k: Tensor, start: int, sinks: int) -> Tensor:
    scores = q @ k[start : start + _BLOCK].to(q.dtype).T
    if start < sinks:
        scores[:, : sinks - start] = float("-inf")
    return scores


def choose_pages(mass: Tensor, count: int, lexical: Tensor | None = None, lexical_weight: float = 0.0) -> list[Choice]:
    """Return the pages to read, best first.

    Args:
        mass: `[heads, P]`, each head's mass on each page.
        count: how many pages; fewer are returned where fewer have any vote.
        lexical: `[P]`, a lexical index's scores of the same pages, or None.
        lexical_weight: weight of the lexical vote beside the heads'.
    """
    heads = mass.mean(0)
    vote = heads.clone()
    words = torch.zeros_like(heads)
    if lexical is not None and float(lexical.sum()) > 0:
        # The lexical vote is sharpened to a distribution over its best pages, so that both votes are shares.
        words = torch.softmax(lexical.float().masked_fill(lexical <= 0, float("-inf")), 0)
        vote = (vote + lexical_weight * words) / (1 + lexical_weight)
    order = torch.argsort(vote, descending=True, stable=True)[:count].tolist()
    leading, by_words = _leading(heads, count), _leading(words, count)
    chosen = []
    for page in order:
        if float(vote[page]) <= 0:
            break
        sources = [name for name, pages in (("heads", leading), ("lexical", by_words)) if page in pages]
        chosen.append(Choice(page, float(vote[page]), "+".join(sources) or "heads+lexical"))
    return chosen


def _leading(vote: Tensor, count: int) -> set[int]:
    """Return the best pages of one vote; a page without any vote is not among them."""
    best = torch.argsort(vote, descending=True, stable=True)[:count]
    return set(best[vote[best] > 0].tolist())
