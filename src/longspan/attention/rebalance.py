"""Adaptive resolution: which pages of a layer stay readable exactly, by the attention mass that they receive.

`PageMass` holds, for one layer of one context, a decayed average of the share of attention that each page of 64 tokens
got in decode: a leaf the weights of its keys, a node that stood for its tokens its own weight, spread evenly over its
pages. Shares are averaged over query heads; what the window got is not counted. It belongs to the context, as the
pages do: the layer's KV carries it as `mass`, and `attention.tree` adds to it where it is there. A step costs what the
step read, not the number of pages: nodes are kept by level and spread when they are asked for.

`rebalance` then moves pages within a budget of bytes: the hottest are held as they came, or in the format that was
asked for, less hot ones in fewer bits, cold ones as their summary alone; and back, where a copy was kept.
It does not know how pages are kept, or when to run: between decode steps, every few of them, is enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longspan.attention.tree_descent import FANOUT
from longspan.errors import UsageError
from longspan.kv.base import PAGE
from longspan.kv.pool import Resolution

FORMATS = ("int2", "int4")
"""What pages are held in between their summary and what they come in."""
_LAST = 64
"""Steps that are still looked at when one no longer fits the bytes."""
_LARGEST = 1e100
"""Old mass decays by letting new mass grow; beyond this all is scaled back."""


class ResolvablePages(Protocol):
    """What `rebalance` needs of a layer's KV (`kv.pages.PagedKV` has it)."""

    @property
    def length(self) -> int:
        """Tokens of the context."""

    def ladder(self, formats: Sequence[str]) -> Sequence[Resolution]:
        """Return what pages can be held as, from the summary up: in these formats, and in what they come in."""

    def levels(self, ladder: Sequence[Resolution]) -> tuple[Tensor, Tensor]:
        """Return where on the ladder each page is held, and up to where it can be brought, int64 `[pages]` each."""

    def demote(self, pages: Sequence[int], to: str, *, keep_exact: bool = False) -> None:
        """Hold pages in less detail, with a copy of what they were kept elsewhere or without."""

    def promote(self, pages: Sequence[int], to: str | None = None) -> None:
        """Bring pages back from their copies, to another resolution than those or (None) as they are."""


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
    budget: int,
    *,
    formats: Sequence[str] = FORMATS,
    sinks: int = 4,
    window: int = 1024,
    hysteresis: float = 0.5,
    moves: int = 64,
    keep_exact: bool = True,
) -> Moves:
    """Demote cold pages and promote hot ones, so that all pages together take at most `budget` bytes.

    Of a page with the mass m, a step up the ladder is worth m times the error it takes away, over the bytes it adds.
    Steps are taken from the worthiest down, until the bytes are spent: with errors that fall ever less from step to
    step, as they do, no other choice within these bytes leaves a smaller sum of mass times error (but for what the last
    bytes could have bought).

    Args:
        kv: the layer's pages.
        mass: `[ceil(length / PAGE)]`, the attention each page gets (`PageMass.pages`); equal mass: the older is colder.
        budget: bytes of all pages, those of sinks and window included, summaries left out.
        formats: what pages can be held in between the summary and what they come in.
        sinks: first tokens whose pages always stay as exact as they can be.
        window: newest tokens whose pages do: at least the mechanism's window, a page more, and what was not committed
            yet, since it may be taken back.
        hysteresis: bytes that one page holds go to another only if they are worth more than `1 + hysteresis` times
            there what they are worth here.
        moves: pages promoted at most in this call; those of sinks and window are not counted.
        keep_exact: whether a demoted page leaves a copy behind, from which it can be promoted again.

    Raises:
        UsageError: the budget does not hold sinks and window, or `mass` has not one entry a page.
    """
    pages = -(-kv.length // PAGE)
    if mass.shape != (pages,):
        raise UsageError(f"mass must have one entry for each of the {pages} pages, not the shape {tuple(mass.shape)}")
    ladder = kv.ladder(formats)
    held, best = kv.levels(ladder)
    nbytes = torch.tensor([resolution.nbytes for resolution in ladder])
    pinned = torch.zeros(pages, dtype=torch.bool)
    pinned[: -(-sinks // PAGE)] = True
    pinned[max(0, kv.length - window) // PAGE :] = True
    needed = int(nbytes[best[pinned]].sum())
    if needed > budget:
        raise UsageError(f"budget={budget} bytes must hold sinks and window: allow {needed} or more")
    heat = mass.detach().double().cpu().nan_to_num(0.0)
    # Where nothing was measured nothing is promoted; what is held there is ordered by age and by level.
    most = torch.where(heat > 0, best, held)
    waiting = ((most > held) & ~pinned).nonzero().flatten()
    most[waiting[torch.argsort(_worth(heat, held, ladder)[waiting], descending=True)[moves:]]] = 0
    most = torch.maximum(most, held)
    target = torch.where(
        pinned, best, _climb(heat, held, most.masked_fill(pinned, 0), ladder, budget - needed, hysteresis)
    )
    # Demoted first, so that the budget holds at every moment.
    for level in range(len(ladder)):
        colder = ((target == level) & (held > level)).nonzero().flatten().tolist()
        if colder:
            kv.demote(colder, ladder[level].name, keep_exact=keep_exact)
    for level in range(1, len(ladder)):
        for back in (False, True):
            hotter = ((target == level) & (held < level) & ((best == level) == back)).nonzero().flatten().tolist()
            if hotter:
                kv.promote(hotter, None if back else ladder[level].name)
    return Moves(
        tuple((target < held).nonzero().flatten().tolist()), tuple((target > held).nonzero().flatten().tolist())
    )


def _gains(ladder: Sequence[Resolution]) -> Tensor:
    """Return what each step of the ladder takes away of the error, over the bytes it adds, float64 `[steps]`."""
    steps = itertools.pairwise(ladder)
    gains = torch.tensor([(low.error - high.error) / (high.nbytes - low.nbytes) for low, high in steps]).double()
    # A step that is worth more than the one below it is only had together with that.
    return gains.cummin(0).values


def _worth(heat: Tensor, level: Tensor, ladder: Sequence[Resolution]) -> Tensor:
    """Return what the next step up is worth for each page, `[pages]`; 0 at the top."""
    gains = torch.cat([_gains(ladder), torch.zeros(1, dtype=torch.float64)])
    return heat * gains[level]


def _climb(
    heat: Tensor, held: Tensor, most: Tensor, ladder: Sequence[Resolution], budget: int, hysteresis: float
) -> Tensor:
    """Return the level of each page, int64 `[pages]`, at most `most`, within a number of bytes."""
    pages, steps = heat.numel(), len(ladder) - 1
    sizes = torch.tensor([high.nbytes - low.nbytes for low, high in itertools.pairwise(ladder)])
    positive = heat[heat > 0]
    unmeasured = float(positive.min()) * 1e-6 if positive.numel() else 1.0
    level = torch.arange(1, steps + 1).unsqueeze(1)
    worth = _gains(ladder).unsqueeze(1) * heat.clamp(min=unmeasured)  # [steps, pages]
    worth = torch.where(level <= held, worth * (1 + hysteresis), worth).masked_fill(level > most, -1.0)
    # A stable sort of pages from the newest on, level by level: among equals the older page goes without, and no page
    # takes a step before the one below it.
    order = torch.sort(worth.flip(1).flatten(), descending=True, stable=True).indices
    order = order[: int((worth >= 0).sum())]
    at, page = order // pages, pages - 1 - order % pages
    spent = sizes[at].cumsum(0)
    fits = int(torch.searchsorted(spent, budget, right=True))
    target = torch.zeros(pages, dtype=torch.int64).scatter_reduce(0, page[:fits], at[:fits] + 1, "amax")
    left = budget - (int(spent[fits - 1]) if fits else 0)
    # Smaller steps may fit where the next one did not.
    for one, step in zip(page[fits : fits + _LAST].tolist(), at[fits : fits + _LAST].tolist(), strict=True):
        if int(sizes[step]) <= left and int(target[one]) == step:
            target[one] += 1
            left -= int(sizes[step])
    return target
