"""Asks a model the questions of RULER that a journal does not hold yet, length by length, and tells how far it is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from longspan.engine.llm import LLM
from longspan.evals.journal import Journal
from longspan.evals.progress import duration
from longspan.evals.ruler.asking import Reply, Tick, ask, template_of
from longspan.evals.ruler.rows import Key, Row, answered, row_of
from longspan.evals.ruler.scoring import score
from longspan.evals.ruler.sources import Sources
from longspan.evals.ruler.tasks import VERSION, example


@dataclass(frozen=True)
class Given:
    """What is asked for."""

    tasks: list[str]
    lengths: list[int]
    questions: int
    """Of each task at each length."""
    seed: int
    sources: Sources = field(default_factory=Sources)
    kv: str = "auto"
    """Format of keys and values, as the engine was told."""


def plan(llm: LLM, given: Given) -> list[Key]:
    """Return every question that is asked for, in the order of asking: lengths, then tasks."""
    model = llm.model
    made_of = (VERSION, given.sources.digest, model.tokenizer_hash, template_of(model))
    same = Key(
        questions=hashlib.blake2b(repr(made_of).encode("utf-8", "backslashreplace"), digest_size=8).hexdigest(),
        fingerprint=model.fingerprint,
        dtype=str(model.dtype).removeprefix("torch."),
        attention="auto" if llm.attention is None else llm.attention.describe(),
        prefill="" if llm.prefill_by is None else llm.prefill_by.describe(),
        kv=given.kv,
        kv_budget=llm.kv_budget.limit or 0,
        task="",
        length=0,
        seed=given.seed,
        question=0,
    )
    return [
        same._replace(task=task, length=length, question=number)
        for length in given.lengths
        for task in given.tasks
        for number in range(given.questions)
    ]


def run(
    llm: LLM,
    keys: Sequence[Key],
    sources: Sources,
    journal: Journal,
    about: dict[str, Any],
    tell: Callable[[str], None],
    reading: Callable[[str], Tick] = lambda _: lambda _, __: None,
) -> None:
    """Ask what the journal does not hold yet.

    Args:
        llm: whose model is asked, as it attends.
        keys: from `plan`.
        sources: those of the plan.
        journal: gets a row a question.
        about: the environment of this run.
        tell: told the progress, a line a question.
        reading: told what is read; returns what is told how far that is.
    """
    done = answered(journal.entries)
    left = [key for key in keys if key not in done]
    if not left:
        return
    template, progress = template_of(llm.model), _Progress(keys, tell)
    for key in keys:
        if key in done:
            progress.before(row_of(done[key]))
    journal.begin(about)
    beyond: set[str] = set()
    for key in left:
        made = example(
            key.task, llm.model.tokens, key.length, key.question, key.seed, template=template, sources=sources
        )
        reply = ask(llm, made, template, reading(f"reading {key.task}"))
        if reply.beyond and reply.attention not in beyond:
            beyond.add(reply.attention)
            window = llm.model.dimensions.window
            tell(f"{reply.attention} reads beyond the {window} tokens that the model was trained on: expect nonsense")
        row = Row(
            **key._asdict(),
            tokens=made.tokens,
            depths=list(made.depths),
            score=score(reply.text, made.outputs, part=made.part),
            read_by=reply.attention,
            read_tokens_per_s=round(reply.read_tokens / reply.read_seconds, 1),
            kept_bytes=reply.kept_bytes,
            first_token_s=round(reply.first_token_seconds, 3),
            decode_tokens_per_s=round(_speed(reply), 1),
            answer=reply.text.strip(),
            wanted=list(made.outputs),
        )
        journal.append(asdict(row))
        progress.asked(row, reply)


class _Progress:
    """Tells a line a question: the score so far of its task and length, speed, and time left."""

    def __init__(self, keys: Sequence[Key], tell: Callable[[str], None]) -> None:
        """Begin with nothing done of these questions."""
        self._tell, self._count = tell, len(keys)
        self._tokens = sum(key.length for key in keys)
        self._scores: dict[tuple[str, int], list[float]] = {}
        self._done = self._passed = 0
        self._since = time.perf_counter()

    def before(self, row: Row) -> None:
        """Count a question that was answered in an earlier run."""
        self._scores.setdefault((row.task, row.length), []).append(row.score)
        self._done += 1
        self._tokens -= row.length

    def asked(self, row: Row, reply: Reply) -> None:
        """Count an answer, and tell how far it is."""
        self.before(row)
        self._passed += row.length
        # Making, reading and answering a question all take time in proportion to its tokens, nearly.
        left = (time.perf_counter() - self._since) / self._passed * self._tokens
        scores = self._scores[row.task, row.length]
        self._tell(
            f"[{self._done}/{self._count}] {row.task} {row.length}: {100 * sum(scores) / len(scores):.0f} % of "
            f"{len(scores)}, read at {row.read_tokens_per_s:,.0f} tokens/s, about {duration(left)} left"
        )


def _speed(reply: Reply) -> float:
    """Return decoded tokens a second, the first left out: it comes with the question."""
    later = reply.decoded_tokens - 1
    return later / reply.decode_seconds if later > 0 and reply.decode_seconds else 0.0
