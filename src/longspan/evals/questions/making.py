"""Examples for a tokenizer and a length: as much haystack as the length holds.

The same seed gives the same examples for the same tokenizer, length, template, sources and setup. It does not know
models.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

from longspan.errors import UnknownNameError, UsageError
from longspan.evals.questions.example import Eval, Example, Family, Setting, Template, Tokens
from longspan.evals.questions.fill import fill
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources

_BARE = Template("", "")
"""Around a text whose probability is measured: it is nobody's turn."""


def named(evaluation: Eval, text: str) -> list[str]:
    """Read names of an eval's tasks with commas between, each once; `all` are all.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: none is named.
    """
    found: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name != "all" and name not in evaluation.tasks:
            raise UnknownNameError(f"unknown task {name!r}: use all, or some of {', '.join(evaluation.tasks)}")
        found.update(dict.fromkeys(evaluation.tasks if name == "all" else [name]))
    if not found:
        raise UsageError("no task is named: give --tasks all, or names with commas between")
    return list(found)


def examples(
    evaluation: Eval,
    task: str | Family,
    tokens_of: Tokens,
    length: int,
    count: int,
    seed: int,
    *,
    template: Template | None = None,
    sources: Sources | None = None,
    setup: Setup | None = None,
) -> list[Example]:
    """Return `count` examples of a task; arguments as for `example`."""
    given = {"template": template or Template(), "sources": sources or Sources(), "setup": setup or Setup()}
    return [example(evaluation, task, tokens_of, length, i, seed, **given) for i in range(count)]  # type: ignore[arg-type]


def example(
    evaluation: Eval,
    task: str | Family,
    tokens_of: Tokens,
    length: int,
    index: int,
    seed: int,
    *,
    template: Template | None = None,
    sources: Sources | None = None,
    setup: Setup | None = None,
) -> Example:
    """Return one example, filled with as much haystack as its length holds.

    Args:
        evaluation: the eval.
        task: a name of its tasks, or a configuration of one's own.
        tokens_of: splits a text into tokens, without special tokens at its ends.
        length: tokens of prompt and answer together that are not passed: those of template and context, and of
            what is asked, template and answer prefix, and the answer's `max_tokens`.
        index: which example, from 0.
        seed: of all examples of a task and length.
        template: what stands around the parts; None: nothing, with a space before the answer prefix.
        sources: where prose and documents come from; None: what comes with Python and Longspan.
        setup: where the question stands, and in which order passages do; None: as the eval has it.

    Raises:
        UnknownNameError: no such task.
        UsageError: the length does not hold the task's smallest example, or the setup is none for the task.
    """
    name = task if isinstance(task, str) else type(task).__name__.lower()
    family = evaluation.tasks[named(evaluation, task)[0]] if isinstance(task, str) else task
    sources, setup = sources or Sources(), setup or Setup()
    series = "" if evaluation.paired else f"-{name}-{length}"
    rng = random.Random(f"{evaluation.name}{series}-{seed}-{index}")
    draft = family.draw(rng, Setting(tokens_of, length, sources, index, seed))
    draft, asked = setup.arranged(draft)
    template = _BARE if draft.follows else template or Template()
    limit = draft.max_tokens or family.max_tokens
    made = Example(
        task=name,
        index=index,
        context="",
        head=draft.head,
        question=draft.question,
        asked=asked,
        answer_prefix=draft.answer_prefix,
        outputs=draft.outputs,
        scoring=family.scoring,
        max_tokens=limit,
        tokens=0,
        depths=(),
        template=template,
        follows=draft.follows,
        chance=draft.chance,
        guess=draft.guess,
    )

    def tokens(units: int) -> int:
        return length_of(replace(made, context=draft.context(units)), tokens_of)

    units = fill(tokens, length, draft.least)
    if units is None:
        raise UsageError(f"{length} tokens do not hold a question of {name}: ask for {tokens(draft.least)} or more")
    context = draft.context(units)
    return replace(made, context=context, tokens=tokens(units), depths=_depths(context, draft.needles))


def length_of(made: Example, tokens_of: Tokens) -> int:
    """Return the tokens of an example's prompt and answer together (see `example`)."""
    parts = (made.template.before, made.context, made.follows or made.closing)
    return sum(len(tokens_of(part)) for part in parts) + (0 if made.follows else made.max_tokens)


def _depths(context: str, needles: Iterable[str]) -> tuple[float, ...]:
    places = sorted(context.index(needle) for needle in needles)
    return tuple(round(place / len(context), 4) for place in places)
