"""Mechanisms side by side on one text: what reading less costs, at several budgets of keys.

The text is prefilled once a length (densely, or as asked); each mechanism at each budget then goes on from that same
context, so that what differs is what it reads and nothing else. Who evicts reads the same tokens itself, since what it
keeps depends on how it reads. Measured against dense:

- perplexity of the text's next tokens, as a ratio;
- agreement: on dense's own greedy continuation, how often the mechanism's likeliest token is the same;
- needles: facts of one form with distractors (multi-key), asked for at the end of a haystack of the same length;
- keys that one query head scores or reads in a decode step, averaged over the layers;
- decode speed: the median step, and its ratio to dense steps taken right after it, so that a busy machine slows both.

A budget is a share of the context's keys. It does not measure prefill, and one text is one sample.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from longspan.attention import Hints, Mechanism, make, parse
from longspan.engine import prompts
from longspan.engine.kv_context import KVContext
from longspan.engine.llm import LLM
from longspan.errors import UsageError
from longspan.evals.facts import Question
from longspan.evals.needle import build
from longspan.evals.progress import duration
from longspan.hf.model import CausalModel
from longspan.retrieval.choose import choose_pages, page_mass

_ASKING = 64
"""Newest tokens of a plain text that ask for pages in place of a question."""
_ANSWER = 24
"""Tokens that an answer may take."""


@dataclass(frozen=True)
class Task:
    """What is measured at one length."""

    length: int
    tokens: list[int]
    """The text: `length` tokens, and those whose perplexity is measured."""
    haystacks: int
    greedy: int
    seed: int


@dataclass(frozen=True)
class Contender:
    """A mechanism at one budget."""

    spec: str
    """As the user wrote it."""
    budget: str
    """A share such as `1/8`, or `all`."""
    mechanism: Mechanism


@dataclass(frozen=True)
class Row:
    """One mechanism at one budget and length."""

    mechanism: str
    budget: str
    length: int
    options: str
    """The specification with the options that the budget set."""
    keys: float
    perplexity: float
    perplexity_ratio: float
    agreement: float
    greedy_tokens: int
    needles: int
    questions: int
    decode_tokens_per_s: float
    decode_ratio: float
    """To dense's, measured right afterwards."""


def contenders(
    specs: list[str], budgets: list[str], length: int, leave_out: Callable[[str], None] | None = None
) -> list[Contender]:
    """Return every mechanism at every budget, dense first; one without a budget stands as it is.

    Args:
        specs: specifications.
        budgets: shares such as `1/8`.
        length: tokens of the context.
        leave_out: told which mechanism can't work within which budget; None: that is an error.

    Raises:
        UsageError: no such mechanism, or a budget that it can't work within.
    """
    found = [Contender("dense", "all", make("dense"))]
    for spec in specs:
        mechanism = parse(spec)
        if mechanism.name == "dense":
            continue
        if mechanism.prefill_only:
            raise UsageError(f"{spec} makes prefill cheaper and decodes densely: give it with --prefill")
        for budget in budgets:
            try:
                within = mechanism.within(max(1, int(Fraction(budget) * length)), length)
            except UsageError as error:
                if leave_out is None:
                    raise
                leave_out(f"left out: {spec} at {budget} of {length} tokens: {error}")
                continue
            found.append(Contender(spec, budget, within))
    return found


def measure(
    llm: LLM,
    specs: list[str],
    budgets: list[str],
    task: Task,
    prefill: Mechanism | None = None,
    known: Sequence[Row] = (),
    say: Callable[[str], None] = lambda _: None,
    leave_out: Callable[[str], None] | None = None,
) -> Iterator[Row]:
    """Yield a row a contender, dense first.

    Args:
        llm: its model and retrieval heads; how it attends is not used.
        specs: see `contenders`.
        budgets: see `contenders`.
        task: what is measured.
        prefill: by what the contexts are read (but by who evicts); None: densely.
        known: rows of this task that an earlier run measured: they are left out.
        say: told what is being done.
        leave_out: see `contenders`.

    Raises:
        UsageError: a mechanism that can't work within a budget.
    """
    model = llm.model
    done = {(row.mechanism, row.budget): row for row in known}
    runners = [
        each for each in contenders(specs, budgets, task.length, leave_out) if (each.spec, each.budget) not in done
    ]
    if not runners:
        return
    say(f"{task.length} tokens: reading the text")
    text = _Text(llm, task, prefill)
    say(f"{task.length} tokens: reading {task.haystacks} haystack(s)")
    needles = _Needles(llm, task, prefill, by_model=any(each.mechanism.wanted_pages for each in runners))
    began = time.perf_counter()
    dense = done.get(("dense", "all"))
    for number, runner in enumerate(runners, 1):
        left = (time.perf_counter() - began) / max(1, number - 1) * (len(runners) - number + 1)
        about = f", about {duration(left)} left" if number > 1 else ""
        say(f"{task.length} tokens, {number} of {len(runners)}{about}: {runner.mechanism.describe()}")
        perplexity, agreement, speed, ratio = text.measure(runner.mechanism)
        right, questions = needles.score(runner.mechanism)
        row = Row(
            mechanism=runner.spec,
            budget=runner.budget,
            length=task.length,
            options=runner.mechanism.describe(),
            keys=round(_keys(runner.mechanism, task.length, model), 1),
            perplexity=round(perplexity, 4),
            perplexity_ratio=round(perplexity / dense.perplexity, 4) if dense else 1.0,
            agreement=round(agreement, 4),
            greedy_tokens=task.greedy,
            needles=right,
            questions=questions,
            decode_tokens_per_s=round(speed, 2),
            decode_ratio=round(ratio, 3) if dense else 1.0,
        )
        dense = dense or row
        yield row


class _Text:
    """A text that was read once, its next tokens, and dense's own greedy continuation of it."""

    def __init__(self, llm: LLM, task: Task, prefill: Mechanism | None) -> None:
        self.llm, self.task = llm, task
        self.context = KVContext(llm.model, make("dense"), prefill)
        # The last token is read by each mechanism itself: its logits are the first that count.
        self.context.extend(task.tokens[: task.length - 1])
        self.last = task.tokens[task.length - 1]
        self.pages: Tensor | None = None
        self.continuation = self._greedy()

    def measure(self, mechanism: Mechanism) -> tuple[float, float, float, float]:
        """Return perplexity of the next tokens, agreement with dense, decode tokens/s, and their ratio to dense's."""
        context, before = _reading(self.context, mechanism), self.context.length
        context.hints = self._hints(mechanism)
        try:
            following = self.task.tokens[self.task.length :]
            logits = context.score([self.last, *following[:-1]])
            wanted = torch.tensor(following, device=logits.device)
            perplexity = math.exp(float(torch.nn.functional.cross_entropy(logits, wanted)))
            context.truncate(before)
            said, seconds = self._follow(context)
        finally:
            context.truncate(before)
            self.context.attend_by(make("dense"))
            self.context.hints = Hints()
        _, of_dense = self._follow(self.context)
        self.context.truncate(before)
        agreed = sum(a == b for a, b in zip(said, self.continuation, strict=True))
        return perplexity, agreed / len(said), 1 / seconds, of_dense / seconds

    def _follow(self, context: KVContext) -> tuple[list[int], float]:
        """Read dense's continuation token by token; return what would be said after each, and the median seconds."""
        said, seconds = [], []
        for token in [self.last, *self.continuation[:-1]]:
            since = time.perf_counter()
            said.append(int(context.step([token]).argmax()))
            seconds.append(time.perf_counter() - since)
        return said, statistics.median(seconds)

    def _greedy(self) -> list[int]:
        before, found, token = self.context.length, [], self.last
        for _ in range(self.task.greedy):
            token = int(self.context.step([token]).argmax())
            found.append(token)
        self.context.truncate(before)
        return found

    def _hints(self, mechanism: Mechanism) -> Hints:
        """Return the pages that the newest tokens ask for, since a plain text has no question."""
        if not mechanism.wanted_pages:
            return Hints()
        if self.pages is None:
            asking = self.context.tokens[-_ASKING:]
            mass = self.context.mass(asking, self.llm.heads())
            mass[:, -2 * _ASKING :] = 0  # the asking tokens themselves, which every window holds
            self.pages = page_mass(mass)
        chosen = choose_pages(self.pages, mechanism.wanted_pages)
        return Hints(chosen_pages=tuple(choice.page for choice in chosen))


class _Needles:
    """Haystacks that were read once, and their questions with the pages that the retrieval heads choose for them."""

    def __init__(self, llm: LLM, task: Task, prefill: Mechanism | None, *, by_model: bool) -> None:
        self.llm = LLM(llm.model, "dense")
        self.read: list[tuple[KVContext, Question, list[int], list[int]]] = []
        for i in range(task.haystacks):
            haystack = build(llm.model, "multikey", task.length, task.seed + i)
            session = self.llm.session()
            session.memory = context = KVContext(llm.model, make("dense"), prefill)
            self.llm.add_text(session, haystack.text)
            self.llm.prefill(session)
            session.head = len(prompts.before_documents(llm.model))
            for question in haystack.questions:
                pages: list[int] = []
                if by_model:
                    mass = context.mass(prompts.search_question(llm.model, question.text), self.llm.heads())
                    mass[:, : session.head] = 0
                    pages = page_mass(mass).mean(0).argsort(descending=True).tolist()
                suffix = prompts.after_documents(llm.model, question.text, [])
                self.read.append((context, question, suffix, pages))

    def score(self, mechanism: Mechanism) -> tuple[int, int]:
        """Return how many answers are right, of how many questions."""
        right = 0
        for read, questions in itertools.groupby(self.read, key=lambda each: each[0]):
            context = _reading(read, mechanism)
            right += sum(self._right(context, *each[1:]) for each in questions)
            read.attend_by(make("dense"))
        return right, len(self.read)

    def _right(self, context: KVContext, question: Question, suffix: list[int], pages: list[int]) -> bool:
        """Answer greedily from the context as it was read, and stop once the answer is there."""
        before, model, mechanism = context.length, self.llm.model, context.mechanism
        context.hints = Hints(chosen_pages=tuple(pages[: mechanism.wanted_pages]))
        try:
            written: list[int] = []
            token = int(context.step(suffix).argmax())
            while token not in model.end_tokens and len(written) < _ANSWER:
                written.append(token)
                if question.right(model.decode(written)):
                    return True
                token = int(context.step([token]).argmax())
        finally:
            context.truncate(before)
            context.hints = Hints()
        return False


def _reading(context: KVContext, mechanism: Mechanism) -> KVContext:
    """Return a context that goes on from the same tokens by a mechanism: the same one, or one of who evicts."""
    if not mechanism.evicts:
        context.attend_by(mechanism)
        return context
    own = KVContext(context.model, mechanism)
    own.extend(context.tokens)
    return own


def _keys(mechanism: Mechanism, length: int, model: CausalModel) -> float:
    """Return the keys and summaries that a decode step reads a query head, averaged over the layers."""
    layers = model.dimensions.layers
    dense = min(layers, int(getattr(mechanism, "dense_layers", 0)))
    keys = mechanism.cost(length, model.dimensions.shape(4.0)).decode_keys
    return (dense * length + (layers - dense) * keys) / layers
