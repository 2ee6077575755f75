"""The 13 tasks by name, and their examples for a tokenizer and a length.

The same seed gives the same examples for the same tokenizer, length and sources. It does not know models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from longspan.errors import UnknownNameError, UsageError
from longspan.evals.ruler.common import Common
from longspan.evals.ruler.documents import Documents
from longspan.evals.ruler.example import Draft, Example, Family, Setting, Template, Tokens
from longspan.evals.ruler.fill import fill
from longspan.evals.ruler.frequent import Frequent
from longspan.evals.ruler.niah import Niah
from longspan.evals.ruler.sources import Sources
from longspan.evals.ruler.tracking import Tracking

VERSION = 1
"""Of the questions: to be raised by whoever changes what a seed gives."""

TASKS: dict[str, Family] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", needle_keys=4),
    "niah_multikey_2": Niah("needle"),
    "niah_multikey_3": Niah("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", key_values=4),
    "niah_multiquery": Niah("essay", queries=4),
    "vt": Tracking(chains=1, hops=4),
    "cwe": Common(common=10, often=30, seldom=3),
    "fwe": Frequent(alpha=2.0),
    "qa_1": Documents(),
    "qa_2": Documents(hops=True),
}
"""RULER's names and configurations (`scripts/synthetic.yaml`)."""


def named(text: str) -> list[str]:
    """Read names of tasks with commas between, each once; `all` are all (UnknownNameError: there is no such task)."""
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name != "all" and name not in TASKS:
            raise UnknownNameError(f"unknown task {name!r}: use all, or some of {', '.join(TASKS)}")
        found.update(dict.fromkeys(TASKS if name == "all" else [name]))
    if not found:
        raise UsageError("no task is named: give --tasks all, or names with commas between")
    return list(found)


def examples(
    task: str | Family,
    tokens_of: Tokens,
    length: int,
    count: int,
    seed: int,
    *,
    template: Template | None = None,
    sources: Sources | None = None,
) -> list[Example]:
    """Return `count` examples of a task; arguments as for `example`."""
    sources = sources or Sources()
    return [example(task, tokens_of, length, i, seed, template=template, sources=sources) for i in range(count)]


def example(
    task: str | Family,
    tokens_of: Tokens,
    length: int,
    index: int,
    seed: int,
    *,
    template: Template | None = None,
    sources: Sources | None = None,
) -> Example:
    """Return one example, filled with as much haystack as its length holds.

    Args:
        task: a name of `TASKS`, or a configuration of one's own.
        tokens_of: splits a text into tokens, without special tokens at its ends.
        length: tokens of prompt and answer together that are not passed: those of template and context, and of
            question, template and answer prefix, and the answer's `max_tokens`.
        index: which example, from 0.
        seed: of all examples of a task and length.
        template: what stands around the parts; None: nothing, with a space before the answer prefix.
        sources: where prose and documents come from; None: what comes with Python and Longspan.

    Raises:
        UnknownNameError: no such task.
        UsageError: the length does not hold the task's smallest example.
    """
    name = task if isinstance(task, str) else type(task).__name__.lower()
    family = TASKS[named(task)[0]] if isinstance(task, str) else task
    template, sources = template or Template(), sources or Sources()
    draft = family.draw(
        random.Random(f"ruler-{name}-{length}-{seed}-{index}"), Setting(tokens_of, length, sources, index, seed)
    )
    asking = len(tokens_of(after(draft, template))) + len(tokens_of(template.before)) + family.max_tokens

    def tokens(units: int) -> int:
        return asking + len(tokens_of(draft.context(units)))

    units = fill(tokens, length, draft.least)
    if units is None:
        raise UsageError(f"{length} tokens do not hold a question of {name}: ask for {tokens(draft.least)} or more")
    context = draft.context(units)
    return Example(
        task=name,
        index=index,
        context=context,
        question=draft.question,
        answer_prefix=draft.answer_prefix,
        outputs=draft.outputs,
        max_tokens=family.max_tokens,
        tokens=tokens(units),
        part=family.part,
        depths=_depths(context, draft.needles),
    )


def after(asked: Example | Draft, template: Template) -> str:
    """Return all of a prompt that stands after its context."""
    return asked.question + template.between + asked.answer_prefix


def _depths(context: str, needles: Iterable[str]) -> tuple[float, ...]:
    places = sorted(context.index(needle) for needle in needles)
    return tuple(round(place / len(context), 4) for place in places)
