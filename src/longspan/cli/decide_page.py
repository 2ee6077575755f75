"""The page of `longspan decide`: the choice, what is out and why, what would flip it, and the whole tree."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.evals.report.page import Part, Section, Table, Value
from longspan.evals.report.page import page as html
from longspan.lengths import short
from longspan.planner.decide import Decision
from longspan.planner.flips import Flip
from longspan.planner.tree import Branch, Leaf


def page(found: Decision, changes: Sequence[Flip], tree: Branch) -> str:
    """Return the page of a decision as HTML that loads nothing from anywhere."""
    asked = found.question.asked
    chosen = "nothing fits" if found.choice is None else found.choice.name
    about = f"{asked.model.name}, {short(asked.context)} tokens, {asked.ranks.count} x {asked.device.title}"
    ranked = [each for each in (found.choice, found.runner_up) if each is not None]
    parts: list[Part] = [
        Table(
            "Chosen, and what comes next", ["attention", "why"], [(each.name, [_words(each.why())]) for each in ranked]
        )
    ]
    if changes:
        rows = [(each.when, [_words(each.choice)]) for each in changes]
        parts.append(Table("What would flip it, each found by deciding again", ["if", "then"], rows))
    out = [
        (each.name, [_words("; ".join([*each.against, *each.limits]) or "not as good, or slower")])
        for each in found.out
    ]
    sections = [
        Section("The choice", "", parts),
        Section("The tree", "", [_tree(branch) for branch in tree.under if isinstance(branch, Branch)]),
        Section("What is out", "", [Table("Why the others are not chosen", ["attention", "because"], out)]),
    ]
    notes = [f"Nothing meets every limit: {limit}" for limit in found.relaxed]
    facts = [("times rest on", line) for line in (found.choice.plan.by if found.choice else ())]
    return html(
        f"{asked.model.name}: {chosen}",
        about,
        facts,
        notes,
        sections,
        made_by="longspan decide",
        how="What it rests on",
    )


def _tree(branch: Branch) -> Table:
    """Return the decisions of one kind of hardware, a row a stretch of contexts."""
    rows = [
        (each.name, [_words(leaf.when), _words(leaf.choice), _words(leaf.why)])
        for each in branch.under
        if isinstance(each, Branch)
        for leaf in each.under
        if isinstance(leaf, Leaf)
    ]
    return Table(f"On {branch.name}", ["if", "contexts", "choice", "why"], rows)


def _words(text: str) -> Value:
    return Value(text, words=True)
