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

    def fields(self) -> dict[str, Any]:
        """Return the configuration's fields."""
        return {
            "vocab_size": VOCABULARY, "hidden_size": self.width, "layers_block_type": [_KINDS[k] for k in self.layers],
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "intermediate_size": 2 * self.width, "ssm_state_size": self.state, "mamba_num_heads": self.width // 16,
            "mamba_head_dim": 32, "n_groups": 1, "expand": 2, "max_position_embeddings": 1 << 24,
            "bos_token_id": START, "eos_token_id": END, "pad_token_id": END, "tie_word_embeddings": False,
        }  # fmt: skip


SIZES = {
    "small": Size("MM*M*", 128, 4, 2, 32, 32),  # 0.5M: a core learns recall with it in minutes
    "needle": Size("MM*-MM*-M*", 320, 5, 1, 64, 64),  # about 5M: what one GPU trains
}


@dataclass(frozen=True)
class Phase:
    """What is read up to a share of the time."""

    until: float
    length: int
    """Tokens of a sequence."""
    text: float = 0.5
    """Share of it that is text; the rest is questions."""
    density: float = 1.0
    """See `tasks.Mix`."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    size: str = "small"
    phases: Sequence[Phase] = (Phase(0.2, 64), Phase(0.45, 128), Phase(0.75, 256), Phase(1.0, 512))
    batch: int = 2048
    """Tokens of a step; a sequence longer than that is a step alone."""
    rates: Rates = field(default_factory=Rates)
    text_weight: float = 0.1
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
            Phase(0.05, 128), Phase(0.12, 512), Phase(0.25, 2048, 0.6, 0.5), Phase(0.45, 8192, 0.75, 0.2),
            Phase(0.7, 32768, 0.9, 0.05), Phase(1.0, 65536, 0.95, 0.02),
        ),
        batch=131072,
    ),
}  # fmt: skip
"""By name. `needle` has not been run: it is `small`'s, with lengths and batches for one H100 and half an hour."""


def shorter(recipe: Recipe, longest: int) -> Recipe:
    """Return a recipe whose sequences have at most `longest` tokens."""
    return replace(recipe, phases=tuple(replace(p, length=min(p.length, longest)) for p in recipe.phases))


def named(name: str, seed: int, begin: float = 0.0, end: float = 1.0) -> Recipe:
    """Return a recipe by its name (UsageError: there is none), with a seed, from one share of its phases to another."""
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}: use {' or '.join(RECIPES)}")
    return replace(RECIPES[name], seed=seed, begin=begin, end=end)
