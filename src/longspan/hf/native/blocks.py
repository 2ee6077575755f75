"""The blocks of a native forward: weights of one sublayer each, and what it makes of normed tokens `[T, d]`.

    h += mixer(h / rms(h) * w)

Every block has two faces: `read`, many tokens of one sequence, and `step`, one token of each sequence of a batch, in
fixed shapes and without a question to the device, so that a step can be captured in a CUDA graph. Kernels do the work
(`longspan.kernels`); matrix products of many tokens are PyTorch's.
It does not know families of models (a file each), pages, or how long a state is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from longspan.hf.attention import Reader
from longspan.hf.native import handing
from longspan.hf.native.handing import Split
from longspan.kernels.causal_conv import causal_conv
from longspan.kernels.experts import Routing, mixture
from longspan.kernels.gemv import gemv
from longspan.kernels.mamba2 import gated_rmsnorm, mixer_step, scan
from longspan.kernels.rmsnorm import rmsnorm

FEW = 8
"""Tokens up to which a product reads its weights faster as a matrix times a few vectors."""


class Steps(Protocol):
    """What one token of each sequence finds of what its layers remember, in tensors that stay where they are."""

    def attend(self, block: Attention, rows: Tensor) -> Tensor:
        """Take `[B, (Hq + 2 Hkv) D]`, keep keys and values, and return what the queries read, `[B, Hq Dv]`."""
        ...

    def state(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's convolution inputs `[B, C, W - 1]` and recurrent state, to be written to."""
        ...


@dataclass
class Run:
    """What many tokens find of what layers remember, and what they leave."""

    reader: Reader
    before: Mapping[str, Tensor]
    """Recurrent states before these tokens, by the names of `hf.hybrid`; empty: before the first."""
    after: dict[str, Tensor] = field(default_factory=dict)
    split: Split | None = None
    """Of which tokens these are this rank's part, states before and after being those of all; None: all are here."""


class Mixer(Protocol):
    """A sublayer, without its norm and the residual stream."""

    def read(self, x: Tensor, run: Run) -> Tensor:
        """Mix tokens `[T, d]`."""
        ...

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """Mix one token of each sequence, `[B, d]`."""
        ...


@dataclass(frozen=True)
class Norm:
    """`x / rms(x) * weight` over the last axis."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm of `x + residual`, and that sum."""
        return rmsnorm(x, self.weight, self.eps, residual)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention; positions are the reader's affair."""

    ordinal: int
    """Which of the layers that attend it is."""
    qkv: Tensor
    """Queries', keys' and values' rows, `[(Hq + 2 Hkv) D, d]`."""
    out: Tensor
    """`[d, Hq D]`."""
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    q_norm: Norm | None = None
    """Of each head's query, and `k_norm` of its key."""
    k_norm: Norm | None = None

    def read(self, x: Tensor, run: Run) -> Tensor:
        """See `Mixer`."""
        rows = product(x, self.qkv).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = rows.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = self.normed(q, k)
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))  # [1, H, T, D]
        read = run.reader.attend(self.ordinal, q, k, v, self.scale)
        return product(read.transpose(1, 2).flatten(2)[0], self.out)

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """See `Mixer`."""
        return product(steps.attend(self, product(x, self.qkv)), self.out)

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys `[..., D]` after their heads' norms."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        q, k = q.contiguous(), k.contiguous()
        return self.q_norm(q)[0], self.k_norm(k)[0]


@dataclass(frozen=True)
class Mamba:
    """A Mamba-2 layer (arXiv 2405.21060): `in_proj` makes gate, convolved inputs x, B, C, and time steps."""

    layer: int
    """Among all layers, as states are named."""
    in_proj: Tensor
    """`[I + C + H, d]`, with C = I + 2 G N."""
    conv: Tensor
    """`[C, W]`."""
    conv_bias: Tensor | None
    a: Tensor
    """float32 `[H]`, negative."""
    d: Tensor
    dt_bias: Tensor
    norm: Norm
    """Of groups of the gated output."""
    out: Tensor
    """`[d, I]`."""
    heads: int
    head_dim: int
    groups: int
    state: int
    """N, numbers of a channel's state."""

    @property
    def inner(self) -> int:
        """Channels of the output (I)."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution (C)."""
        return self.inner + 2 * self.groups * self.state

    def read(self, x: Tensor, run: Run) -> Tensor:
        """See `Mixer`; the convolution's state is handed on with W columns, of which the first is not used."""
        count = x.shape[0]
        names = f"{self.layer}.conv.0", f"{self.layer}.recurrent.0"
        inputs, recurrent = (run.before.get(name) for name in names)
        projected = product(x, self.in_proj)
        gate, mixed, dt = projected.split([self.inner, self.channels, self.heads], 1)
        inputs = None if inputs is None else inputs[..., 1:].contiguous()
        newest = None
        if run.split is not None:
            inputs, newest = handing.inputs(run.split.group, mixed, self.conv.shape[1] - 1, inputs)
        mixed, inputs = causal_conv(mixed.unsqueeze(0), self.conv, self.conv_bias, inputs, activation="silu")
        sizes = [self.inner, self.groups * self.state, self.groups * self.state]
        values, b, c = mixed.split(sizes, 2)
        given = (
            values.view(1, count, self.heads, self.head_dim), dt.unsqueeze(0), self.a,
            b.view(1, count, self.groups, self.state), c.view(1, count, self.groups, self.state),
        )  # fmt: skip
        last = None
        if run.split is not None:
            _, own = scan(*given, dt_bias=self.dt_bias)
            kept = handing.left(given[1], self.a, self.dt_bias)
            recurrent, last = handing.states(run.split.group, own, kept, recurrent)
        y, recurrent = scan(*given, D=self.d, dt_bias=self.dt_bias, state=recurrent)
        del mixed, values, b, c, given
        if newest is not None and last is not None:
            inputs, recurrent = newest, last
        run.after[names[0]] = functional.pad(inputs, (1, 0))
        run.after[names[1]] = recurrent
        normed = gated_rmsnorm(y.view(count, self.inner), gate, self.norm.weight, self.groups, self.norm.eps)
        return product(normed, self.out)

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """See `Mixer`."""
        inputs, recurrent = steps.state(self.layer)
        normed = mixer_step(
            product(x, self.in_proj), self.conv, self.conv_bias, inputs, self.a, recurrent, self.norm.weight,
            groups=self.groups, norm_groups=self.groups, eps=self.norm.eps, D=self.d, dt_bias=self.dt_bias,
        )  # fmt: skip
        return product(normed, self.out)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, and what every token has of its own beside them."""

    router: Tensor
    """`[E, d]`."""
    bias: Tensor | None
    """float32 `[E]`, for the choice alone."""
    routing: Routing
    up: Tensor
    """`[E, I, d]`; or gated, `[E, 2 I, d]`."""
    down: Tensor
    """`[E, d, I]`."""
    activation: str
    shared: tuple[Tensor, Tensor] | None = None
    """Up and down of an expert that every token has."""

    def read(self, x: Tensor, run: Run) -> Tensor:
        """See `Mixer`."""
        return self(x)

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """See `Mixer`."""
        return self(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Mix tokens `[T, d]`."""
        return mixture(
            x, wide_product(x, self.router), self.bias, self.up, self.down,
            routing=self.routing, activation=self.activation, shared=self.shared,
        )  # fmt: skip


@dataclass(frozen=True)
class Mlp:
    """`down(relu(up(x))^2)`, or gated: `down(silu(gate(x)) * up(x))`."""

    up: Tensor
    """`[I, d]`; or gated, `[2 I, d]`: the gate's rows first."""
    down: Tensor
    """`[d, I]`."""
    activation: str

    def read(self, x: Tensor, run: Run) -> Tensor:
        """See `Mixer`."""
        return self(x)

    def step(self, x: Tensor, steps: Steps) -> Tensor:
        """See `Mixer`."""
        return self(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Mix tokens `[T, d]`."""
        hidden = product(x, self.up)
        if self.activation == "relu2":
            return product(hidden.relu_().square_(), self.down)
        gate, hidden = hidden.chunk(2, 1)
        return product(functional.silu(gate).mul_(hidden), self.down)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T` of `[T, in]`."""
    return gemv(x, weight) if x.shape[0] <= FEW else functional.linear(x, weight)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T` in float32 (float64 stays): products of half numbers are exact there, whatever multiplies them."""
    kind = torch.promote_types(x.dtype, torch.float32)
    if x.shape[0] <= FEW:
        return gemv(x, weight, out_dtype=kind)
    if x.is_cuda and x.dtype == weight.dtype and x.dtype.itemsize == 2:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.to(kind) @ weight.to(kind).T
