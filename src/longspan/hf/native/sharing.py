"""A mixture of experts whose experts lie on several ranks, each held by one of them.

The router and what every token has of its own (a shared expert) are on every rank. Of its tokens' experts a rank
computes those that it holds, one row for each pair of a token and an expert, and outputs of all ranks are summed in
float32: where every rank runs the same tokens (a question, decode) by one reduction, where each runs a part of them the
tokens are gathered first, and outputs go back to the rank whose they are. Sums are those of one rank to rounding.
It does not know how tokens are split, or which families have experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from longspan.distributed.group import Group
from longspan.distributed.layout import contiguous
from longspan.errors import UsageError
from longspan.hf.native.blocks import Experts, Mixer, Mlp, Norm, Run, Steps, wide_product
from longspan.hf.native.handing import Split
from longspan.hf.native.stack import Stack
from longspan.kernels.experts import experts, route


@dataclasses.dataclass(frozen=True)
class SharedExperts:
    """One rank's experts of a mixture, and what is on every rank."""

    whole: Experts
    """The mixture, with this rank's weights for `up` and `down`."""
    first: int
    """The first of this rank's experts, among all."""
    group: Group

    def read(self, x: Tensor, run: Run) -> Tensor:
        """See `Mixer`."""
        return self(x, run.split)

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """See `Mixer`; every rank has the same tokens."""
        return self(x, None)

    def __call__(self, x: Tensor, split: Split | None) -> Tensor:
        """Mix tokens `[T, d]`, which all ranks have, or of which each has its part."""
        if split is None:
            summed = self.group.reduce(self._own(x))
        else:
            padded = nn.functional.pad(x, (0, 0, 0, max(split.counts) - x.shape[0]))
            every = torch.cat([part[:n] for part, n in zip(self.group.gather(padded), split.counts, strict=True)])
            pieces = [piece.contiguous() for piece in self._own(every).split(list(split.counts))]
            summed = torch.stack(self.group.deal(pieces)).sum(0)
        if self.whole.shared is not None:
            summed = summed + Mlp(*self.whole.shared, self.whole.activation)(x)
        return summed.to(x.dtype)

    def _own(self, x: Tensor) -> Tensor:
        """Return what this rank's experts add to tokens `[T, d]`, in float32 (float64 where x is)."""
        whole, how = self.whole, dataclasses.asdict(self.whole.routing)
        ids, weights = route(wide_product(x, whole.router), whole.bias, **how)
        own = ids.long() - self.first
        token, slot = torch.where((own >= 0) & (own < whole.up.shape[0]))
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if len(token):
            chosen = own[token, slot].int().unsqueeze(1), weights[token, slot].unsqueeze(1)
            made = experts(x[token], whole.up, whole.down, *chosen, activation=whole.activation)
            out.index_add_(0, token, made.to(out.dtype))
        return out


def share(stack: Stack, weights: Iterable[nn.Parameter], group: Group) -> Stack:
    """Return a model whose experts are dealt out over ranks; memory of those that lie elsewhere is given back.

    Args:
        stack: the model, with all experts.
        weights: what its modules hold; of experts they hold this rank's alone afterwards.
        group: the ranks; all of them must call it.

    Raises:
        UsageError: it has no experts, or fewer than ranks.
    """
    held = {parameter.data_ptr(): parameter for parameter in weights}

    def shared(mixer: Mixer) -> Mixer:
        if not isinstance(mixer, Experts):
            return mixer
        number = mixer.up.shape[0]
        if number < group.size:
            raise UsageError(f"{number} experts can't be split over {group.size} ranks: leave out experts")
        first, stop = contiguous(number, group.size).runs[group.rank][0]
        own = {}
        for name in ("up", "down"):
            tensor = getattr(mixer, name)
            own[name] = tensor[first:stop].clone()
            if (parameter := held.get(tensor.data_ptr())) is not None:
                parameter.data = own[name]
        return SharedExperts(dataclasses.replace(mixer, **own), first, group)

    sublayers: list[tuple[Norm, Mixer]] = [(norm, shared(mixer)) for norm, mixer in stack.sublayers]
    if not any(isinstance(mixer, SharedExperts) for _, mixer in sublayers):
        raise UsageError("the model has no experts that could be split over ranks: leave out experts")
    return dataclasses.replace(stack, sublayers=sublayers)
