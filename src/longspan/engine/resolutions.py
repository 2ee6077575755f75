"""Pages of a context whose mechanism reads on where they are held in less detail: which of them stay exact.

A byte budget is shared out evenly among the layers, and each layer's part among its pages (`attention/rebalance.py`).
It does not know models, nor what else the budget pays for: the context does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from longspan.attention.rebalance import FORMATS, PageMass, rebalance
from longspan.errors import PoolExhaustedError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget, size
from longspan.kv.pages import PagedKV
from longspan.kv.undisturbed import Undisturbed


@dataclass(frozen=True)
class Needs:
    """What of every layer is given, whatever the pages' attention."""

    length: int
    """Tokens of the context."""
    new: int
    """Tokens that are about to be added."""
    sinks: int
    """First tokens whose pages stay as exact as they can be."""
    window: int
    """Newest tokens whose pages do."""
    formats: tuple[str, ...] = FORMATS
    """What pages are held in between their summary and what they come in; none where those below are read."""


def settle(layers: Sequence[PagedKV], masses: Sequence[PageMass], nbytes: int, needs: Needs, budget: Budget) -> None:
    """Hold cold pages of every layer in less detail and hot ones in more, so that new tokens fit as well.

    Demoted pages leave a copy of what they were held as below, which this budget does not count.

    Args:
        layers: of the context.
        masses: how much attention their pages get.
        nbytes: of all layers together, summaries included.
        needs: see `Needs`.
        budget: whose bytes they are, as errors name it.

    Raises:
        PoolExhaustedError: the bytes do not hold what must stay exact.
    """
    for kv, mass in zip(layers, masses, strict=True):
        with Undisturbed():
            _settle(kv, mass, nbytes // len(layers), nbytes, needs, budget)


def demoted(
    layers: Sequence[PagedKV], tensors: Mapping[str, Tensor], nbytes: int, needs: Needs, budget: Budget
) -> dict[str, Tensor]:
    """Return saved layers (`PagedKV.tensors`, with the layer's number in front) in as much detail as bytes allow.

    Nothing is known of their attention: older pages count as colder. Arguments and errors as for `settle`.
    """
    out: dict[str, Tensor] = {}
    for i, kv in enumerate(layers):
        free = PagedKV(kv.pool.empty(), kv.rotary)
        free.reads_below = kv.reads_below
        free.restore(f"{i}.", needs.length, tensors)
        _settle(free, PageMass(), nbytes // len(layers), nbytes, needs, budget)
        out |= free.tensors(f"{i}.")
        free.free()
    return out


def _settle(kv: PagedKV, mass: PageMass, share: int, nbytes: int, needs: Needs, budget: Budget) -> None:
    pool, now = kv.pool, len(kv.table)
    pages = -(-(needs.length + needs.new) // PAGE)
    # New pages come in the model's own type; one more may be needed for a copy of the page that is open.
    share -= (pages + 1) * pool.marks.page_bytes + (pages - now + 1) * pool.native.page_bytes
    window, sinks = max(needs.window, pool.format.residual), max(needs.sinks, pool.format.sinks)
    try:
        rebalance(kv, mass.pages(now), share, formats=needs.formats, sinks=sinks, window=window)
    except UsageError as error:
        after = f" and {needs.new} that are read next" if needs.new else ""
        raise PoolExhaustedError(
            f"the {budget.root.name} budget of {size(nbytes)} does not hold the newest {window} tokens of every layer"
            f"{after}: raise it (--kv-budget)"
        ) from error
