"""What a Mamba-2 layer remembers, handed along ranks that run neighbouring parts of the same tokens: exactly.

A state is linear in the one before it: over a part of the tokens `S = left * S_before + S_own`, with `S_own` what the
part leaves by itself and `left = exp(sum of d A)` a number a head (arXiv 2405.21060, section 6, which does so over
chunks). Every rank reads its part from an empty state, all tell `S_own` and `left` in one message, and each puts
together what came before its own part and reads that again from there: two short scans a rank where one rank would need
as many as there are parts, and projections, the most of a layer, once. The convolution's newest inputs travel alike.
It does not know how tokens are split, or when.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.distributed.group import Group
from longspan.kernels.mamba2 import NO_LIMIT
from longspan.kernels.mamba2.reference import time_steps


@dataclass(frozen=True)
class Split:
    """Tokens of which each rank runs a part: neighbours, in the order of the ranks, where layers keep a state."""

    group: Group
    counts: tuple[int, ...]
    """How many each runs."""


def inputs(group: Group, mixed: Tensor, width: int, before: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return a convolution's inputs before this rank's tokens, and those behind the last rank's.

    Args:
        group: the ranks; all of them must call it.
        mixed: `[T, C]`, this rank's, at least as many tokens as a convolution looks back.
        width: how many tokens that is.
        before: `[1, C, width]` of the tokens before the first rank's; None: there are none.

    Returns:
        Both `[1, C, width]`; the first None where there are none before.
    """
    assert mixed.shape[0] >= width, "a part is longer than what a convolution looks back"
    every = group.gather(mixed[mixed.shape[0] - width :].mT.unsqueeze(0))
    return before if group.rank == 0 else every[group.rank - 1], every[-1].clone()


def left(dt: Tensor, a: Tensor, dt_bias: Tensor | None) -> Tensor:
    """Return the logarithm of what is left, behind all tokens, of the state before them, `[1, H]`; as in `scan`."""
    return time_steps(dt, dt_bias, NO_LIMIT).sum(1) * a


def states(group: Group, own: Tensor, kept: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before this rank's tokens, and that behind the last rank's.

    Args:
        group: the ranks; all of them must call it.
        own: `[1, H, P, N]`, what this rank's tokens leave from an empty state.
        kept: `[1, H]`, what `left` returned.
        before: `[1, H, P, N]`, the state before the first rank's; None: empty.

    Returns:
        Both `[1, H, P, N]`; the second has the same bits on every rank.
    """
    every = group.gather(torch.cat([own.flatten(), kept.to(own.dtype).flatten()]))
    state = torch.zeros_like(own) if before is None else before.to(own.dtype)
    mine = state
    for rank in range(group.size):
        if rank == group.rank:
            mine = state
        part, log = every[rank].split([own.numel(), kept.numel()])
        state = part.view_as(own) + state * log.view(*kept.shape, 1, 1).exp()
    return mine, state
