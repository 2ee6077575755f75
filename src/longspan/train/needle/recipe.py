"""The needle model's recipe: sizes, lengths by share of the time, rates: all that was settled by trial.

It does not know how any of it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from longspan.errors import UsageError
from longspan.train.needle.tasks import END, START, VOCABULARY
from longspan.train.optimiser import Rates

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    layers: str
    """One letter a layer: M (Mamba-2), * (attention without positions), - (an MLP)."""
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    state: int
    """Numbers of a channel's state in Mamba-2."""
    mamba_dim: int = 32
    """Channels of a head of Mamba-2."""

    def fields(self) -> dict[str, Any]:
        """Return the configuration's fields."""
        return {
            "vocab_size": VOCABULARY, "hidden_size": self.width, "layers_block_type": [_KINDS[k] for k in self.layers],
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": 2 * self.width, "ssm_state_size": self.state, "n_groups": 1, "expand": 2,
            "mamba_num_heads": 2 * self.width // self.mamba_dim, "mamba_head_dim": self.mamba_dim,
            "max_position_embeddings": 1 << 24, "bos_token_id": START, "eos_token_id": END, "pad_token_id": END,
            "tie_word_embeddings": False,
        }  # fmt: skip


SIZES = {
    "small": Size("MM*M*", 128, 4, 2, 32, 32),  # 0.5M: a core learns recall with it in minutes
    "needle": Size("MMM*-MM*-M*-", 256, 4, 2, 64, 64, 64),  # 4.2M: what one GPU trains
}


@dataclass(frozen=True)
class Phase:
    """What is read up to a share of the time."""

    until: float
    length: int
    """Tokens of a sequence."""
    asked: int
    """Tokens at its end that are for questions."""
    density: float = 1.0
    """See `tasks.Mix`."""
    segments: Sequence[int] = ()
    """Texts see only their own segment of so many tokens in some steps (`attending.py`), one of these at random; 0:
    all. None are named: they see all in every step."""
    rows: int = 32
    """Tokens of a sequence that search."""
    searching: float = 0.0
    """How much learning where to search counts."""
    sparse: float = 0.0
    """Share of steps in which questions see only what they find."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    size: str = "small"
    phases: Sequence[Phase] = (
        Phase(0.2, 64, 32),
        Phase(0.45, 128, 64),
        Phase(0.75, 256, 128),
        Phase(1.0, 512, 256, searching=0.3),
    )
    batch: int = 2048
    """Tokens of a step; a sequence longer than that is a step alone."""
    rates: Rates = field(default_factory=Rates)
    rank: int = 32
    """Of routing queries."""
    text_weight: float = 0.2
    """How much predicting the text counts, beside the answers' 1."""
    begin: float = 0.0
    """Share of the phases that earlier runs have done: this one starts from their weights."""
    end: float = 1.0
    """Share that is done after this run."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no recipe."""
        if self.size not in SIZES:
            raise UsageError(f"there is no size {self.size!r}: use {' or '.join(SIZES)}")
        if not 0 <= self.begin < self.end <= 1:
            raise UsageError(
                f"--begin {self.begin} and --end {self.end} leave nothing: give shares of the phases, 0 to 1"
            )

    def phase(self, done: float) -> Phase:
        """Return what is read when a share of this run's time is done."""
        whole = self.begin + done * (self.end - self.begin)
        return next((phase for phase in self.phases if whole < phase.until), self.phases[-1])


RECIPES = {
    "small": Recipe(),
    "needle": Recipe(
        "needle",
        (
            Phase(0.01, 64, 32), Phase(0.05, 256, 128), Phase(0.12, 1024, 256, 0.4, (0, 128), searching=0.1),
            Phase(0.35, 4096, 512, 0.2, (0, 256, 512), searching=0.3, sparse=0.2),
            Phase(0.6, 16384, 1024, 0.05, (0, 256, 1024, 3072), rows=64, searching=0.3, sparse=0.4),
            Phase(1.0, 65536, 1024, 0.02, (0, 256, 1024, 3072), rows=96, searching=0.3, sparse=0.4),
        ),
        batch=131072,
        rank=64,
    ),
}  # fmt: skip
"""By name. `needle` is for one H200 and nine minutes."""


def shorter(recipe: Recipe, longest: int) -> Recipe:
    """Return a recipe whose sequences have at most `longest` tokens."""
    phases = tuple(
        p if p.length <= longest else replace(p, length=longest, asked=min(p.asked, longest // 2), segments=())
        for p in recipe.phases
    )
    return replace(recipe, phases=phases)


def named(name: str, seed: int, begin: float = 0.0, end: float = 1.0) -> Recipe:
    """Return a recipe by its name (UsageError: there is none), with a seed, from one share of its phases to another."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}: use {' or '.join(RECIPES)}")
    return replace(RECIPES[name], seed=seed, begin=begin, end=end)
