"""How a question is put: what people recommend against forgetting, as options of every task where they make sense.

- `question`: after the context as the eval has it, before it (the model reads knowing what is asked), or both;
- `order`: passages that share most words with the question stand first or last, where models read best ("lost in the
  middle", arXiv 2307.03172), the others in their own order;
- `context`: what is read of it, see `readings.py`.

It does not know models; lengths are counted after a context was arranged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from longspan import specs
from longspan.errors import UsageError
from longspan.evals.questions import pieces, readings
from longspan.evals.questions.example import Draft, Eval
from longspan.evals.questions.readings import Reading

QUESTION = ("after", "before", "both")
ORDER = ("kept", "first", "last")
_MOVED = 8
"""Passages that `order` moves: what a reader could take in again."""


@dataclass(frozen=True)
class Setup:
    """How questions of a run are put."""

    question: str = "after"
    order: str = "kept"
    context: str = "full"
    """A specification of `readings.py`."""

    def __post_init__(self) -> None:
        """Refuse what is no choice."""
        for name, given, known in (("question", self.question, QUESTION), ("order", self.order, ORDER)):
            if given not in known:
                raise UsageError(f"--{name} {given!r} is none of {', '.join(known)}")
        readings.parse(self.context)

    @property
    def reading(self) -> Reading:
        """What is read of a context."""
        return readings.parse(self.context)

    def describe(self) -> str:
        """Return what differs from the eval's own way, such as `question=both,order=last`; empty: nothing."""
        told = replace(self, context=readings.describe(self.reading))
        changed = {f.name: getattr(told, f.name) for f in fields(told) if getattr(told, f.name) != f.default}
        return specs.written("", changed).removeprefix(":")

    def check(self, evaluation: Eval, tasks: list[str]) -> None:
        """Refuse what makes no sense for a task (UsageError names the tasks for which it does)."""
        wrong = [task for task in tasks if task not in evaluation.ordered]
        able = ", ".join(task for task in evaluation.tasks if task in evaluation.ordered) or "none of this eval's tasks"
        for option, given, plain in (("order", self.order, "kept"), ("context", self.reading.name, "full")):
            if given != plain and wrong:
                raise UsageError(f"--{option} {given} changes what is right in {', '.join(wrong)}: use it with {able}")
        if self.question != "after" and (wrong := [task for task in tasks if not evaluation.tasks[task].max_tokens]):
            raise UsageError(f"--question is for tasks that ask one, which {', '.join(wrong)} does not: leave it out")

    def arranged(self, draft: Draft) -> tuple[Draft, str]:
        """Return a draft with its context as this setup has it, and what is asked after it."""
        if draft.follows:
            return draft, ""
        if self.order != "kept":
            draft = replace(draft, context=self._reordered(draft))
        if self.question != "after":
            told, context = f"{draft.question}\n\n", draft.context
            draft = replace(draft, head=told + draft.head, context=lambda count: told + context(count))
        return draft, "" if self.question == "before" else draft.question

    def _reordered(self, draft: Draft) -> Callable[[int], str]:
        """Return what makes contexts whose most important passages stand first or last, nearest the end the best."""

        def context(count: int) -> str:
            whole = draft.context(count)
            assert whole.startswith(draft.head), "a head begins its context"
            split = pieces.split(whole[len(draft.head) :])
            best = pieces.best(split.texts, draft.question, _MOVED)
            chosen = set(best)
            rest = [i for i in range(len(split.texts)) if i not in chosen]
            order = [*best, *rest] if self.order == "first" else [*rest, *reversed(best)]
            return draft.head + split.joined(order)

        return context
