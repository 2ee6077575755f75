"""Needle in a haystack as a grid: one fact in real prose, by depth and by length.

Kamradt, "Needle In A Haystack - Pressure Testing LLMs" (2023, github gkamradt/LLMTest_NeedleInAHaystack): a fact stands
at a depth of a text of some length, and is asked for; the grid of both shows where a model forgets. Depths are shares
of the text's characters, eleven of them by default, and a needle stands between the two sentences that are nearest.

The facts are those of `facts.py`, of four kinds: `single`; `multikey` (three more of the same form stand elsewhere);
`paraphrase` (asked in other words); `twofact` (the second fact stands half the text further on, or back where that
passes the end; the score is the share found). A question's number stands for the same question in every cell. An answer
may take 28 tokens a fact. How pages are ranked and cited is the business of `needle.py`, which asks sessions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longspan.errors import UsageError
from longspan.evals import facts
from longspan.evals.questions.example import Draft, Eval, Setting
from longspan.evals.questions.hiding import in_prose

DEPTHS = 11


@dataclass(frozen=True)
class Cell:
    """One depth of the grid."""

    kind: str
    depth: float
    """From 0 to 1."""
    max_tokens: int = 28
    scoring: str = "all"

    def draw(self, rng: random.Random, setting: Setting) -> Draft:
        """See `Family`."""
        source = setting.sources.words
        known, questions = facts.make(self.kind, rng.getrandbits(32))
        asked = rng.choice(questions)
        hidden = [(self.depth + i / len(asked.needs)) % 1.0000001 for i in range(len(asked.needs))]
        placed = list(zip(hidden, (known[i].text for i in asked.needs), strict=True))
        others = [rng.random() for _ in known]
        if self.kind == "multikey":
            alike = facts.alike(known, asked.needs[0])
            placed += [(others[i], known[i].text) for i in alike]
        start = rng.randrange(len(source))
        placed.sort()
        hay = in_prose(source, start, [text for _, text in placed], [depth for depth, _ in placed])
        head = "Read the text below. I will ask for something that it says.\n"
        pools = [facts.pool(answer) for answer in asked.answers]
        return Draft(
            context=lambda count: f"{head}{hay(count)}\n",
            question=f"{asked.text} Answer from the text above, in a few words.",
            answer_prefix="Answer:",
            outputs=asked.answers,
            least=len(placed),
            needles=tuple(known[i].text for i in asked.needs),
            head=head,
            max_tokens=self.max_tokens * len(asked.needs),
            chance=sum(1 / len(pool) for pool in pools) / len(pools),
            guess=lambda own: " ".join(str(own.choice(pool)) for pool in pools),
        )


def grid(kinds: Sequence[str], depths: int) -> Eval:
    """Return the eval of these kinds of facts at so many depths, evenly from the beginning to the end.

    Raises:
        UsageError: an unknown kind, or fewer than two depths.
    """
    for kind in kinds:
        if kind not in facts.KINDS:
            raise UsageError(f"unknown kind {kind!r}: use {', '.join(facts.KINDS)}")
    if depths < 2:
        raise UsageError(f"--depths {depths} is no grid: give at least 2")
    shares = [i / (depths - 1) for i in range(depths)]
    tasks = {f"{kind}_{100 * share:03.0f}": Cell(kind, share) for kind in kinds for share in shares}
    return Eval(
        "needle",
        "one fact in real prose, by depth and by length",
        "Kamradt 2023, Needle In A Haystack",
        version=1,
        tasks=tasks,
        paired=True,
        ordered=frozenset(tasks),
    )


NEEDLE = grid(facts.KINDS, DEPTHS)
