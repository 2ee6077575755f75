"""Adaptive resolution: which pages of a layer stay readable exactly, by the attention mass that they receive.

`PageMass` holds, for one layer of one context, a decayed average of the share of attention that each page of 64 tokens
got in decode: a leaf the weights of its keys, a node that stood for its tokens its own weight, spread evenly over its
pages. Shares are averaged over query heads; what the window got is not counted. It belongs to the context, as the
pages do: the layer's KV carries it as `mass`, and `attention.tree` adds to it where it is there. A step costs what the
step read, not the number of pages: nodes are kept by level and spread when they are asked for.

`rebalance` then moves pages within a budget: cold ones to their summary, hot ones back, where an exact copy was kept.
It does not know how pages are kept, or when to run: between decode steps, every few of them, is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.tree_descent import FANOUT
from longspan.errors import UsageError
from longspan.kv.base import PAGE

_LARGEST = 1e100
"""Old mass decays by letting new mass grow; beyond this all is scaled back."""


class ResolvablePages(Protocol):
    """What `rebalance` needs of a layer's KV (`kv.pages.PagedKV` has it)."""

    @property
    def length(self) -> int:
        """Tokens of the context."""

    @property
    def exact(self) -> Mapping[int, int]:
        """Pages of which an exact copy is kept elsewhere, from which `promote` brings them back."""

    def readable(self) -> Tensor | None:
        """Whether each page can be read token by token, bool `[ceil(length / PAGE)]`; None: all can."""

    def demote(self, pages: Sequence[int], to: str, *, keep_exact: bool = False) -> None:
        """Leave pages to their `"summary"`, with an exact copy kept elsewhere or without."""

    def promote(self, pages: Sequence[int]) -> None:
        """Bring pages back from their exact copies."""


@dataclass(frozen=True)
class Moves:
    """What `rebalance` did, pages ascending."""

    demoted: tuple[int, ...] = ()
    promoted: tuple[int, ...] = ()


class PageMass:
    """A decayed average, over decode steps, of the attention that each page of one layer got."""

    def __init__(self, decay: float = 0.9) -> None:
        """Take by how much a step's mass has faded after the next (0: only the last step counts; 1: all alike)."""
        if not 0 <= decay <= 1:
            raise UsageError(f"decay={decay} must lie between 0 and 1")
        self.decay = decay
        self._levels: list[Tensor] = []  # float64 [nodes seen], in units of 1 / self._unit
        self._unit = 1.0
        self._steps = 0
        self._since: list[int] = []  # the step before which each page was first measured

    def step(self, pages: int) -> None:
        """Begin a decode step in which `pages` pages stand before the window."""
        self._unit /= max(self.decay, 1e-30)
        if self._unit > _LARGEST:
            self._levels = [mass / self._unit for mass in self._levels]
            self._unit = 1.0
        self._since.extend([self._steps] * (pages - len(self._since)))
        self._steps += 1

    def add(self, level: int, nodes: Tensor, mass: Tensor) -> None:
        """Add the mass of nodes of one level (0: pages); both of one shape, a node may appear often."""
        while len(self._levels) <= level:
            self._levels.append(torch.zeros(0, dtype=torch.float64))
        known = -(-len(self._since) // FANOUT**level)
        held = self._levels[level]
        if held.numel() < known:
            # Growing by half keeps the mean cost of a step independent of the number of pages.
            held = torch.cat([held, held.new_zeros(known + known // 2 - held.numel())])
            self._levels[level] = held
        held.index_add_(0, nodes.reshape(-1).cpu(), mass.reshape(-1).to("cpu", torch.float64) * self._unit)

    def pages(self, count: int) -> Tensor:
        """Return the average mass of the first `count` pages, float64 `[count]`; 0 for those never measured."""
        at = torch.arange(count)
        total = torch.zeros(count, dtype=torch.float64)
        for level, held in enumerate(self._levels):
            size = FANOUT**level
            inside = at // size < held.numel()
            total[inside] += held[at[inside] // size] / (size * self._unit)
        seen = torch.tensor(self._since[:count], dtype=torch.float64)
        steps = self._steps - seen
        # The sum of the decays of so many steps: a page that is new here is not taken for cold.
        weight = steps if self.decay == 1 else (1 - self.decay**steps) / (1 - self.decay)
        total[: seen.numel()] /= weight.clamp(min=1e-300)
        total[seen.numel() :] = 0
        return total

    def truncate(self, pages: int) -> None:
        """Forget what was measured of all but the first `pages` pages."""
        del self._since[pages:]
        self._levels = [mass[: pages // FANOUT**level].clone() for level, mass in enumerate(self._levels)]


def rebalance(
    kv: ResolvablePages,
    mass: Tensor,
    budget_pages: int,
    *,
    sinks: int = 4,
    window: int = 1024,
    hysteresis: float = 0.5,
    moves: int = 64,
    keep_exact: bool = True,
) -> Moves:
    """Demote cold pages to their summary and promote hot ones, so that at most `budget_pages` can be read exactly.

    Args:
        kv: the layer's pages.
        mass: `[ceil(length / PAGE)]`, the attention each page gets (`PageMass.pages`); equal mass: the older is colder.
        budget_pages: pages readable exactly, those of sinks and window included.
        sinks: first tokens whose pages always stay readable.
        window: newest tokens whose pages always stay readable: at least the mechanism's window, a page more, and what
            was not committed yet, since it may be taken back.
        hysteresis: a page replaces another only if its mass is more than `1 + hysteresis` times the other's.
        moves: pages promoted at most in this call; those of sinks and window are not counted.
        keep_exact: whether a demoted page leaves an exact copy behind, from which it can be promoted again.

    Raises:
        UsageError: the budget does not hold sinks and window, or `mass` has not one entry a page.
    """
    pages = -(-kv.length // PAGE)
    if mass.shape != (pages,):
        raise UsageError(f"mass must have one entry for each of the {pages} pages, not the shape {tuple(mass.shape)}")
    readable = kv.readable()
    held = torch.ones(pages, dtype=torch.bool) if readable is None else readable.cpu().clone()
    away = torch.zeros(pages, dtype=torch.bool)
    away[list(kv.exact)] = True
    away &= ~held
    pinned = torch.zeros(pages, dtype=torch.bool)
    pinned[: -(-sinks // PAGE)] = True
    pinned[max(0, kv.length - window) // PAGE :] = True
    if int(pinned.sum()) > budget_pages:
        raise UsageError(f"budget_pages={budget_pages} must hold sinks and window: allow {int(pinned.sum())} or more")
    promoted = (pinned & away).nonzero().flatten().tolist()
    heat = mass.detach().double().cpu().nan_to_num(0.0)
    # Stable sorts: among equals the older page is demoted first, and the newer promoted first.
    cold = [page for page in torch.sort(heat, stable=True).indices.tolist() if held[page] and not pinned[page]]
    hot = torch.sort(heat.flip(0), descending=True, stable=True).indices
    waiting = [page for page in (pages - 1 - hot).tolist() if away[page] and not pinned[page]]
    spare = budget_pages - int(held.sum()) - len(promoted)
    demoted, cold = cold[: max(0, -spare)], cold[max(0, -spare) :]
    coming = [page for page in waiting[: max(0, min(spare, moves))] if heat[page] > 0]
    left = moves - len(coming)
    for hotter, colder in zip(waiting[len(coming) :][:left], cold, strict=False):
        if not heat[hotter] > (1 + hysteresis) * heat[colder]:
            break
        coming.append(hotter)
        demoted.append(colder)
    done = Moves(tuple(sorted(demoted)), tuple(sorted(promoted + coming)))
    # Demoted first, so that the budget holds at every moment.
    if done.demoted:
        kv.demote(done.demoted, "summary", keep_exact=keep_exact)
    if done.promoted:
        kv.promote(done.promoted)
    return done
