"""A mixture of experts in plain PyTorch, expert by expert: the truth for faster versions.

`route` chooses a few experts for every token; `experts` sums what they make of it. Routing is that of DeepSeek-V3
(arXiv 2412.19437, section 2.1.2), which Nemotron-H has too: sigmoid scores, and a correction that is added for the
choice alone, so that experts can be kept evenly busy without changing what they weigh. With softmax scores and no
correction it is Mixtral's and Qwen3-MoE's. It does not know where logits come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = ("sigmoid", "softmax")
"""What makes scores of logits."""

_LEAST_SUM = 1e-20
"""Added to the sum that weights are divided by, as the models do."""


@dataclass(frozen=True)
class Routing:
    """How experts are chosen.

    Attributes:
        top: experts a token.
        groups: parts of as many neighbouring experts each; a token's experts come from the best `top_groups` of them. A
            group is as good as the sum of its two best.
        top_groups: see `groups`.
        normalise: whether the weights of a token sum to `scale`.
        scale: what weights are multiplied by.
        scores: one of `SCORES`.
    """

    top: int
    groups: int = 1
    top_groups: int = 1
    normalise: bool = True
    scale: float = 1.0
    scores: str = "sigmoid"

    def check(self, experts: int) -> None:
        """Assert that so many experts can be routed so."""
        assert self.scores in SCORES, f"scores {self.scores!r}"
        assert experts % self.groups == 0 and 1 <= self.top_groups <= self.groups, f"{self} of {experts} experts"
        assert 1 <= self.top <= experts // self.groups * self.top_groups, f"{self} of {experts} experts"
        assert self.groups == 1 or experts // self.groups >= 2, "a group is judged by its two best"


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose experts for every token.

    Args:
        logits: `[T, E]`; computed in float32 (float64 stays float64).
        bias: `[E]`, added to scores for the choice alone; None: nothing.
        routing: how.

    Returns:
        The experts, int32 `[T, top]`, the best first (of equals the one of the lower number), and their weights in the
        computing type, `[T, top]`. A score that is not a number is the worst.
    """
    count, number = logits.shape
    routing.check(number)
    logits = logits.to(_computing(logits))
    scores = logits.sigmoid() if routing.scores == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    choice = choice.nan_to_num(nan=torch.finfo(choice.dtype).min, neginf=torch.finfo(choice.dtype).min)
    if routing.groups > 1:
        grouped = choice.view(count, routing.groups, -1)
        best = _order(grouped.topk(2, -1).values.sum(-1))[:, : routing.top_groups]
        left_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
        choice = grouped.masked_fill(left_out.unsqueeze(-1), float("-inf")).view(count, number)
    ids = _order(choice)[:, : routing.top]
    weights = scores.gather(1, ids)
    if routing.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + _LEAST_SUM)
    return ids.int(), weights * routing.scale


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    activation: str = "relu2",
    shared: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of what each token's experts make of it: `down(activation(up(x)))`.

    Args:
        x: `[T, d]`, any float type; computed in float32 (float64 stays float64).
        up: `[E, I, d]`; or gated, `[E, 2 I, d]`: the gate's rows, then those it is multiplied with (SwiGLU).
        down: `[E, d, I]`.
        ids: int32 or int64 `[T, top]`, from 0 to E - 1.
        weights: `[T, top]`.
        activation: see `activated`.
        shared: up `[Is, d]` (or gated) and down `[d, Is]` of an expert that every token has, with weight 1.
        residual: `[T, d]`, added.

    Returns:
        `[T, d]` in x's type.
    """
    gated = is_gated(up, down)
    kind = _computing(x)
    rows = x.to(kind)
    out = torch.zeros_like(rows) if residual is None else residual.to(kind).clone()
    if shared is not None:
        out += activated(rows @ shared[0].to(kind).T, activation, gated) @ shared[1].to(kind).T
    for i in ids.unique().tolist():
        token, slot = torch.where(ids == i)
        hidden = activated(rows[token] @ up[i].to(kind).T, activation, gated)
        out.index_add_(0, token, hidden @ down[i].to(kind).T * weights[token, slot].to(kind).unsqueeze(1))
    return out.to(x.dtype)


def activated(x: Tensor, activation: str, gated: bool) -> Tensor:
    """Return `relu(x)^2` (`relu2`) or `x sigmoid(x)` (`silu`); gated: of the first half, times the second."""
    assert activation in ("relu2", "silu"), f"activation {activation!r}"
    x, other = x.chunk(2, -1) if gated else (x, None)
    x = x.relu().square() if activation == "relu2" else torch.nn.functional.silu(x)
    return x if other is None else x * other


def is_gated(up: Tensor, down: Tensor) -> bool:
    """Return whether experts of these shapes are gated."""
    inner = down.shape[-1]
    assert up.shape[-2] in (inner, 2 * inner), f"up {tuple(up.shape)}, down {tuple(down.shape)}"
    return up.shape[-2] == 2 * inner


def _order(scores: Tensor) -> Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _computing(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
