"""The decision tree: decisions over hardware, exactness and context, equal neighbours joined; as text, Mermaid or JSON.

Nothing in it is written down beforehand: every leaf is a decision, and every boundary between contexts is searched for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from longspan.lengths import short
from longspan.planner import parallel
from longspan.planner.decide import Question, decide
from longspan.planner.flips import at, boundary, label

CONTEXTS = (8_000, 32_000, 64_000, 128_000, 256_000, 512_000, 1_000_000, 2_000_000, 4_000_000, 10_000_000)
"""Contexts that are decided; where neighbours differ, the boundary between them is searched for."""

_EXACT = (("nothing may be approximated", True), ("approximations are allowed", False))


@dataclass(frozen=True)
class Leaf:
    """A choice, over a stretch of contexts."""

    first: int
    last: int | None
    """None: to the longest context that was decided, and on."""
    choice: str
    why: str

    @property
    def when(self) -> str:
        """The stretch in words."""
        if self.last is None:
            return "any context" if self.first <= CONTEXTS[0] else f"from {short(self.first)} tokens"
        return (
            f"up to {short(self.last)} tokens"
            if self.first <= CONTEXTS[0]
            else f"{short(self.first)} to {short(self.last)}"
        )


@dataclass(frozen=True)
class Branch:
    """A question and its answers."""

    name: str
    under: Sequence[Branch | Leaf]

    def told(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "if": self.name,
            "then": [
                each.told() if isinstance(each, Branch)
                else {"from": each.first, "to": each.last, "choice": each.choice, "why": each.why}
                for each in self.under
            ],
        }  # fmt: skip


def tree(given: Question, hardware: Sequence[tuple[int, int]]) -> Branch:
    """Return the decision tree of a model on a device.

    Args:
        given: the question; its context, exactness and GPUs do not matter.
        hardware: GPUs of a node and nodes, a branch each.
    """
    branches = []
    for gpus, nodes in hardware:
        ranks = replace(given.asked.ranks, gpus=gpus, nodes=nodes)
        placement = parallel.PLACEMENTS["ring"] if ranks.count > 1 else None
        placed = replace(given, asked=replace(given.asked, ranks=ranks, placement=placement))
        parts = [
            Branch(
                "nothing may be approximated" if exact else "approximations are allowed",
                _leaves(replace(placed, exact=exact)),
            )
            for exact in (True, False)
        ]
        branches.append(Branch(_hardware(given, gpus, nodes), parts))
    return Branch(f"{given.asked.model.name}", branches)


def _hardware(given: Question, gpus: int, nodes: int) -> str:
    title = given.asked.device.title
    if nodes > 1:
        return f"{nodes} nodes of {gpus} x {title}"
    return f"one {title}" if gpus == 1 else f"{gpus} x {title}"


def _leaves(given: Question) -> list[Leaf]:
    decisions = [decide(at(given, n)) for n in CONTEXTS]
    starts = [(CONTEXTS[0], decisions[0])]
    for (a, before), (b, after) in itertools.pairwise(zip(CONTEXTS, decisions, strict=True)):
        if (now := label(before.choice)) != label(after.choice):
            starts.append((boundary(functools.partial(_same, given, now), a, b), after))
    ends: list[int | None] = [first for first, _ in starts[1:]]
    return [
        Leaf(first, last, label(decision.choice), "" if decision.choice is None else decision.choice.why())
        for (first, decision), last in zip(starts, [*ends, None], strict=True)
    ]


def _same(given: Question, now: str, n: int) -> bool:
    return label(decide(at(given, n)).choice) == now


def text(branch: Branch) -> str:
    """Return the tree drawn with lines."""
    return "\n".join([branch.name, *_lines(branch.under, "")]) + "\n"


def _lines(under: Sequence[Branch | Leaf], before: str) -> list[str]:
    lines = []
    for i, each in enumerate(under):
        last = i == len(under) - 1
        said = each.name if isinstance(each, Branch) else f"{each.when}: {each.choice}"
        lines.append(f"{before}{'└── ' if last else '├── '}{said}")
        if isinstance(each, Branch):
            lines += _lines(each.under, before + ("    " if last else "│   "))
    return lines


def mermaid(branch: Branch) -> str:
    """Return the tree as a Mermaid flowchart."""
    lines = ["flowchart LR", f'  n0["{_quoted(branch.name)}"]']
    numbers = itertools.count(1)

    def add(under: Sequence[Branch | Leaf], parent: str) -> None:
        for each in under:
            name = f"n{next(numbers)}"
            if isinstance(each, Branch):
                lines.append(f'  {parent} --> {name}["{_quoted(each.name)}"]')
                add(each.under, name)
            else:
                lines.append(f'  {parent} -->|"{_quoted(each.when)}"| {name}(["{_quoted(each.choice)}"])')

    add(branch.under, "n0")
    return "\n".join(lines) + "\n"


def _quoted(said: str) -> str:
    return said.replace('"', "#quot;")
