"""What is lost when fewer bytes are kept: ways to compress a context side by side, ours and a peer's, at equal bytes.

Every context is read before its question is known, compressed, and then asked:

- the questions of some RULER tasks (arXiv 2404.06654), scored from 0 to 1;
- the next tokens of plain prose: perplexity;
- dense's own greedy continuation of that prose: how often the likeliest token is the same (agreement).

A ratio r allows `1/r` of the bytes that dense attention keeps in the model's own number type. A way of ours is a
mechanism, a format of pages, or both (`snapkv+int4`): the format takes its share of r, eviction the rest. Kept bytes
are counted, not assumed: positions, scales and unfilled pages as well. A peer gets the same tokens, and keeps `1/r` of
the keys. It does not measure speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longspan.errors import UsageError
from longspan.evals.asking.local import template_of
from longspan.evals.questions.making import examples
from longspan.evals.questions.scoring import averaged, score, wilson
from longspan.evals.ruler.tasks import RULER
from longspan.hf.model import CausalModel
from longspan.peers.process import Peer

DENSE = "dense"


@dataclass(frozen=True)
class Question:
    """Something asked of a context, greedily."""

    task: str
    tokens: list[int]
    """What follows the context."""
    outputs: tuple[str, ...]
    scoring: str
    max_tokens: int


@dataclass(frozen=True)
class Case:
    """A context, and what follows it."""

    tokens: list[int]
    question: Question | None = None
    follows: tuple[int, ...] = ()
    """Where there is no question: the context's last token and the text's next ones."""


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    kept_bytes: int
    answer: str = ""
    nlls: float = 0.0
    """Sum of the negative log-likelihoods of the text's next tokens."""
    likeliest: tuple[int, ...] = ()
    """The likeliest token after each of dense's own."""


@dataclass(frozen=True)
class Row:
    """One way at one ratio."""

    who: str
    """`longspan`, or the peer."""
    way: str
    ratio: float
    """What was asked for."""
    options: str
    kept_bytes: float
    """Mean over the cases."""
    kept_share: float
    """Of the bytes that the same side's dense attention keeps."""
    perplexity: float
    perplexity_ratio: float
    agreement: float
    tasks: dict[str, float]
    score: float
    """Mean of the tasks' scores."""
    low: float
    high: float
    """Its 95 % interval."""
    text_nlls: tuple[float, ...] = ()
    """Negative log-likelihood of a token, mean over each text's."""


class Runner(Protocol):
    """Compresses contexts in one way, and lets the model go on from them."""

    def run(self, cases: Sequence[Case], continuations: Sequence[Sequence[int]]) -> list[Outcome]:
        """Read each case's context, compress it, and ask or score.

        Args:
            cases: what is asked.
            continuations: dense's own greedy continuation of each text among them, or nothing.
        """
        ...


class Theirs:
    """A press of a peer."""

    def __init__(self, peer: Peer, model: CausalModel, press: str, ratio: float) -> None:
        """Take who is asked; `press` is empty for dense attention."""
        self.peer, self.model, self.press, self.ratio = peer, model, press, ratio

    def run(self, cases: Sequence[Case], continuations: Sequence[Sequence[int]]) -> list[Outcome]:
        """See `Runner`."""
        asked = [self._asked(case, continuation) for case, continuation in paired(cases, continuations)]
        found = self.peer.ask({"press": self.press, "ratio": self.ratio, "cases": asked})["cases"]
        return [self._outcome(case, each) for case, each in zip(cases, found, strict=True)]

    def _asked(self, case: Case, continuation: Sequence[int]) -> dict[str, Any]:
        if (wanted := case.question) is not None:
            ask = {"tokens": wanted.tokens, "max_tokens": wanted.max_tokens, "outputs": wanted.outputs}
            return {"tokens": case.tokens, "score": [], "ask": ask}
        second = [[case.follows[0], *continuation[:-1]]] if continuation else []
        return {"tokens": case.tokens, "score": [list(case.follows), *second], "ask": None}

    def _outcome(self, case: Case, found: dict[str, Any]) -> Outcome:
        if case.question is not None:
            return Outcome(found["bytes"], answer=self.model.decode(found["answer"]))
        first, *second = found["scores"]
        likeliest = tuple(second[0]["likeliest"]) if second else ()
        return Outcome(found["bytes"], nlls=first["nll"], likeliest=likeliest)


def paired(cases: Sequence[Case], continuations: Sequence[Sequence[int]]) -> Iterator[tuple[Case, Sequence[int]]]:
    """Yield each case with the continuation of its text, which questions have none of."""
    texts = iter(continuations)
    for case in cases:
        yield case, () if case.question is not None else next(texts, ())


def cases(
    model: CausalModel, text: str, length: int, tasks: Sequence[str], questions: int, texts: int, following: int, *,
    seed: int, longest_answer: int,
) -> list[Case]:  # fmt: skip
    """Return what is asked of every way.

    Args:
        model: whose tokens are counted.
        text: prose, cut into `texts` pieces with distance between them.
        length: tokens of each context.
        tasks: of RULER.
        questions: of each task.
        texts: pieces of prose.
        following: tokens after each piece whose perplexity is taken.
        seed: which questions.
        longest_answer: tokens of an answer at most, where RULER's task allows more.

    Raises:
        UsageError: the text is too short.
    """
    found = []
    template = template_of(model)
    head = model.tokens(template.before)
    for task in tasks:
        for each in examples(RULER, task, model.tokens, length, questions, seed, template=template):
            asked = Question(
                task,
                model.tokens(each.closing),
                each.outputs,
                each.scoring,
                min(each.max_tokens, longest_answer),
            )
            found.append(Case(head + model.tokens(each.context), asked))
    every = model.tokens(text)
    if len(every) < length + following:
        raise UsageError(f"the text has {len(every)} tokens but {length + following} are needed: give more with --doc")
    for i in range(texts):
        start = i * (len(every) - length - following) // max(1, texts)
        piece = every[start : start + length + following]
        found.append(Case(piece[: length - 1], follows=tuple(piece[length - 1 :])))
    return found


def row(
    who: str, way: str, ratio: float, options: str, all_cases: Sequence[Case], outcomes: Sequence[Outcome],
    continuations: Sequence[Sequence[int]], dense: Row | None,
) -> Row:  # fmt: skip
    """Return one way's row; `dense` is that of the same side, None for dense itself."""
    scores: dict[str, list[float]] = {}
    nlls, count, same, said = 0.0, 0, 0, 0
    each_text = []
    texts = iter(continuations)
    for case, outcome in zip(all_cases, outcomes, strict=True):
        if case.question is not None:
            found = score(outcome.answer, case.question.outputs, case.question.scoring)
            scores.setdefault(case.question.task, []).append(found)
            continue
        nlls += outcome.nlls
        each_text.append(round(outcome.nlls / (len(case.follows) - 1), 5))
        count += len(case.follows) - 1
        wanted = next(texts)
        same += sum(a == b for a, b in zip(outcome.likeliest, wanted, strict=True))
        said += len(wanted)
    perplexity = math.exp(nlls / count) if count else math.nan
    total = averaged([wilson(each) for each in scores.values()]) if scores else None
    kept = sum(outcome.kept_bytes for outcome in outcomes) / len(outcomes)
    return Row(
        who=who,
        way=way,
        ratio=ratio,
        options=options,
        kept_bytes=round(kept),
        kept_share=round(kept / dense.kept_bytes, 5) if dense else 1.0,
        perplexity=round(perplexity, 4),
        perplexity_ratio=round(perplexity / dense.perplexity, 4) if dense else 1.0,
        agreement=round(same / said, 4) if said else math.nan,
        tasks={task: round(sum(each) / len(each), 4) for task, each in scores.items()},
        score=round(total.mean, 4) if total else math.nan,
        low=round(total.low, 4) if total else math.nan,
        high=round(total.high, 4) if total else math.nan,
        text_nlls=tuple(each_text),
    )


def folder_of(model: CausalModel) -> Path:
    """Return the folder that a peer can load the same weights from (UsageError: there is none)."""
    folder = Path(str(getattr(model.config, "_name_or_path", "")))
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model.name} lies in no folder that the peer can load: give --peer-model")
    return folder
