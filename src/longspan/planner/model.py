"""What a model is to the planner: layers, what each keeps of a token, and how many parameters it has.

It does not know configurations (`reading` makes models from them), devices or mechanisms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Attention:
    """What one layer's attention keeps and multiplies."""

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    """Newest tokens that it sees; None: all."""
    latent: int | None = None
    """Numbers kept a token where keys and values are kept compressed (MLA); None: keys and values as they are."""
    rotary: bool = True
    """Whether keys are rotated by their position."""
    shared: bool = False
    """Whether it reads the keys and values of a layer below, and keeps none."""

    @property
    def kept(self) -> int:
        """Numbers kept of every token."""
        if self.shared:
            return 0
        return self.latent or self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Recurrent:
    """A state of one size that one layer carries through the text."""

    state: int
    """Numbers kept in float32."""
    convolution: int
    """Numbers kept in the model's own type."""
    flops: float
    """FLOPs a token beyond its products with weights."""


@dataclass(frozen=True)
class Experts:
    """Parallel feed-forward parts, of which each token takes a few."""

    count: int
    top: int
    parameters: int
    """Of one."""

    def touched(self, tokens: int) -> float:
        """Return how many different experts so many tokens take, if they choose independently."""
        return self.count * (1.0 - (1.0 - self.top / self.count) ** tokens)


@dataclass(frozen=True)
class Layer:
    """One layer; a hybrid's may attend, carry a state, both or neither."""

    attention: Attention | None
    recurrent: Recurrent | None
    experts: Experts | None
    dense: int
    """Parameters that every token uses, norms and the like left out."""
    plain: int
    """Numbers that no format makes smaller: norms, biases, routers."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.plain + (self.experts.count * self.experts.parameters if self.experts else 0)

    @property
    def active(self) -> int:
        """Those that one token uses."""
        return self.dense + self.plain + (self.experts.top * self.experts.parameters if self.experts else 0)


@dataclass(frozen=True)
class Model:
    """A causal language model."""

    name: str
    kind: str
    """`model_type` of its configuration."""
    hidden: int
    vocabulary: int
    layers: Sequence[Layer]
    embedding: int
    """Parameters of token (and learned position) embeddings."""
    head: int
    """Parameters of the output layer; 0 where it is the embedding itself."""
    plain: int
    """Numbers of the last norm and other parts outside layers."""
    trained: int | None
    """Tokens of the longest context it was trained for, as far as its configuration tells."""
    notes: Sequence[str] = ()
    """What whoever plans with it should know."""

    @cached_property
    def parameters(self) -> int:
        """All of them, those that are shared counted once."""
        return self.embedding + self.head + self.plain + sum(layer.parameters for layer in self.layers)

    @cached_property
    def active(self) -> int:
        """Those that one token is multiplied with: of the embedding it takes one row."""
        return (self.head or self.vocabulary * self.hidden) + self.plain + sum(layer.active for layer in self.layers)

    @cached_property
    def attending(self) -> list[Attention]:
        """The attention of every layer that attends, in their order."""
        return [layer.attention for layer in self.layers if layer.attention is not None]

    @cached_property
    def alike(self) -> list[tuple[Attention, int]]:
        """Every kind of attention, and how many layers have it."""
        groups: dict[Attention, int] = {}
        for each in self.attending:
            groups[each] = groups.get(each, 0) + 1
        return list(groups.items())

    @cached_property
    def recurrent(self) -> list[Recurrent]:
        """The state of every layer that carries one."""
        return [layer.recurrent for layer in self.layers if layer.recurrent is not None]

    def token_numbers(self, *, whole: bool = True) -> int:
        """Return the numbers that all layers keep of one token; `whole`: of layers that see the whole context alone."""
        return sum(each.kept for each in self.attending if not (whole and each.window is not None))

    def describe(self) -> str:
        """Return its layers in one line: how many attend, to what, and how many carry a state."""
        told = []
        groups: dict[str, int] = {}
        for each in self.attending:
            heads = f"{each.query_heads}/{each.kv_heads} heads of {each.head_dim}"
            if each.latent:
                heads = f"{each.query_heads} heads over {each.latent} latent numbers"
            seen = "" if each.window is None else f", window {each.window:,}"
            groups[heads + seen] = groups.get(heads + seen, 0) + 1
        told += [f"{count} attention ({what})" for what, count in groups.items()]
        if self.recurrent:
            told.append(f"{len(self.recurrent)} recurrent")
        experts = [layer.experts for layer in self.layers if layer.experts]
        if experts:
            told.append(f"{len(experts)} with {experts[0].count} experts, {experts[0].top} a token")
        return f"{len(self.layers)} layers: " + ", ".join(told)
